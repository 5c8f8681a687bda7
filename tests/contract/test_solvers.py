"""The contract of the solvers, of the rule that stops them, and of the named settings of both."""

from contract.settings import SettingsContract
from contract.solving import SolverContract
from hopdeq_lwpf.solvers import LBFGS, Anderson, Broyden, Picard, Termination, TorchDEQ, build
from hopdeq_lwpf.solvers.torchdeq import THEIRS


class TestPicard(SolverContract):
    covers = (Picard,)
    kind = Picard
    name = "picard"
    variants = {"default": {}, "damped": {"damping": 0.4}}
    wrong = ("damping", 1.5)


class TestAnderson(SolverContract):
    covers = (Anderson,)
    kind = Anderson
    name = "anderson"
    variants = {"default": {}, "short and damped": {"memory": 2, "damping": 0.2}}
    wrong = ("memory", 0)


class TestBroyden(SolverContract):
    covers = (Broyden,)
    kind = Broyden
    name = "broyden"
    wrong = ("memory", 0)


class TestLBFGS(SolverContract):
    covers = (LBFGS,)
    kind = LBFGS
    name = "lbfgs"
    variants = {"default": {}, "without its guard": {"guard": False, "align": 0.0}}
    wrong = ("memory", 0)


class TestTorchDEQ(SolverContract):
    covers = (TorchDEQ,)
    kind = TorchDEQ
    variants = {name: {"name": name} for name in THEIRS}
    wrong = ("m", 1)

    def by_name(self):
        return {"name": self.variant}

    @property
    def name(self):
        return f"torchdeq:{self.variant}"


class TestTermination(SettingsContract):
    covers = (Termination,)
    kind = Termination
    variants = {"default": {}, "strict": {"rtol": 1e-12, "atol": 0.0, "max_steps": 7, "check_every": 2}}
    wrong = ("max_steps", 0)


class TestPresets(SolverContract):
    presets = ("anderson", "broyden", "lbfgs", "picard", "picard_damped")
    variants = {name: name for name in presets}
    exempt = {
        name: "the class of this preset has a case of its own"
        for name in (
            "test_it_is_found_by_its_name_and_a_misspelt_one_names_the_nearest",
            "test_an_unknown_option_is_an_error_that_names_it",
            "test_a_value_that_cannot_be_is_an_error_that_names_the_option",
        )
    }

    def make(self, **options):
        return build(self.options)

    @property
    def kind(self):
        return type(self.make())


class TestPresetStop(SettingsContract):
    presets = ("tight",)
    kind = Termination
    variants = {"tight": {}}
    wrong = ("rtol", -1.0)

    def make(self, **options):
        return build({"stop": "termination", **options}) if options else build("tight")
