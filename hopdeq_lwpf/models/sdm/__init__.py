"""Sparse Distributed Memory (Kanerva 1988), and attention as its approximation (Bricken and Pehlevan 2021)."""

from hopdeq_lwpf.models.sdm.addresses import (
    log_space_fraction,
    nearest_neuron_radius,
    neuron_within,
    radius_for_fraction,
    space_fraction,
)
from hopdeq_lwpf.models.sdm.betas import BetaFit, fit_beta
from hopdeq_lwpf.models.sdm.bounds import ExponentialBounds, analytic_beta, exponential_bounds
from hopdeq_lwpf.models.sdm.caps import log_cap_fraction, log_cap_intersection
from hopdeq_lwpf.models.sdm.effective_beta import (
    HeadBeta,
    QueriesKeys,
    effective_betas,
    head_betas,
    radius_for_beta,
    watch_attention,
)
from hopdeq_lwpf.models.sdm.experiments import (
    ALGORITHMS,
    GridSettings,
    RecallRow,
    make_memory,
    perturb,
    random_patterns,
    recall,
    recall_curve,
    run_grid,
)
from hopdeq_lwpf.models.sdm.function import EmptyReadError, SDMFunction
from hopdeq_lwpf.models.sdm.hopfield import ClassicalHopfield
from hopdeq_lwpf.models.sdm.intersections import (
    expected_shared_neurons,
    log_circle_intersection,
    log_selected_intersection,
)
from hopdeq_lwpf.models.sdm.memory import SDM
from hopdeq_lwpf.models.sdm.neuron_memory import NeuronMemory
from hopdeq_lwpf.models.sdm.neurons import Neurons
from hopdeq_lwpf.models.sdm.projection_training import (
    ProjectedRecall,
    ProjectionCourse,
    ProjectionSettings,
    recall_projected,
    train_projection,
)
from hopdeq_lwpf.models.sdm.projections import ProjectedFunction, ProjectedMemory
from hopdeq_lwpf.models.sdm.query_key_norm import (
    QUERY_KEY_NORM,
    BetaStatistics,
    OptimalBetas,
    beta_statistics,
    optimal_betas,
)
from hopdeq_lwpf.models.sdm.radii import OptimalRadius, critical_distance, optimal_radius
from hopdeq_lwpf.models.sdm.recalls import SDMRecall, cycle_lengths
from hopdeq_lwpf.models.sdm.signals import ReadStatistics, read_statistics
from hopdeq_lwpf.models.sdm.weights import Attention, Cap, Circle, ReadWeights, TransformerAttention

__all__ = [
    "ALGORITHMS",
    "QUERY_KEY_NORM",
    "SDM",
    "Attention",
    "BetaFit",
    "BetaStatistics",
    "Cap",
    "Circle",
    "ClassicalHopfield",
    "EmptyReadError",
    "ExponentialBounds",
    "GridSettings",
    "HeadBeta",
    "NeuronMemory",
    "Neurons",
    "OptimalBetas",
    "OptimalRadius",
    "ProjectedFunction",
    "ProjectedMemory",
    "ProjectedRecall",
    "ProjectionCourse",
    "ProjectionSettings",
    "QueriesKeys",
    "ReadStatistics",
    "ReadWeights",
    "RecallRow",
    "SDMFunction",
    "SDMRecall",
    "TransformerAttention",
    "analytic_beta",
    "beta_statistics",
    "critical_distance",
    "cycle_lengths",
    "effective_betas",
    "expected_shared_neurons",
    "exponential_bounds",
    "fit_beta",
    "head_betas",
    "log_cap_fraction",
    "log_cap_intersection",
    "log_circle_intersection",
    "log_selected_intersection",
    "log_space_fraction",
    "make_memory",
    "nearest_neuron_radius",
    "neuron_within",
    "optimal_betas",
    "optimal_radius",
    "perturb",
    "radius_for_beta",
    "radius_for_fraction",
    "random_patterns",
    "read_statistics",
    "recall",
    "recall_curve",
    "recall_projected",
    "run_grid",
    "space_fraction",
    "train_projection",
    "watch_attention",
]
