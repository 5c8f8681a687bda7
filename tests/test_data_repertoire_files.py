"""Repertoires in DeepRC's files: what was written is read, and all that can be wrong has its line."""

import dataclasses

import pytest
import torch

from hopdeq_lwpf.data import (
    DataError,
    RepertoireOptions,
    RepertoireSet,
    decode_sequences,
    generate_repertoires,
    read_repertoires,
    write_repertoires,
)

SMALL = RepertoireOptions(num_repertoires=6, num_sequences=12.0)


@pytest.mark.parametrize("known", [True, False])
def test_what_was_written_is_read(tmp_path, known):
    made = generate_repertoires(SMALL)
    if not known:
        made = RepertoireSet(dataclasses.replace(made.store, instance_targets=None))
    write_repertoires(made.select([4, 0, 1], max_sequences=2), tmp_path / "new", target_column="status")
    again = read_repertoires(tmp_path / "new")
    assert again.names == [made.names[row] for row in (4, 0, 1)]
    for new, row in zip(again, (4, 0, 1), strict=True):
        old = made[row]
        assert decode_sequences(new["data"]) == decode_sequences(old["data"])
        for name in ("lengths", "counts", "target", *(("instance_target",) if known else ())):
            assert torch.equal(new[name], old[name])
        assert ("instance_target" in new) is known
    with pytest.raises(DataError, match=r"metadata\.tsv: is there already"):
        write_repertoires(made, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_nothing_is_left_where_writing_fails(tmp_path):
    made = generate_repertoires(SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: is a file, needs a folder"):
        write_repertoires(made, tmp_path / "file")
    names = ("a", "b" * 300, *made.names[2:])  # longer than a name of a file may be
    bad = RepertoireSet(dataclasses.replace(made.store, names=names))
    with pytest.raises(DataError, match="new: File name too long"):
        write_repertoires(bad, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


GOOD_META = "ID\tstatus\tage\nr1.tsv\t+\t3\nr2\t-\t4\n"
GOOD_FIRST = "templates\tamino_acid\tv\n3\tACD\tx\n0\tWY\ty\n"
GOOD_SECOND = "\ufeffamino_acid\ttemplates\r\nKKKK\t12\r\n\r\n"


def folder_of(tmp_path, meta=GOOD_META, first=GOOD_FIRST, second=GOOD_SECOND):
    (tmp_path / "repertoires").mkdir()
    (tmp_path / "metadata.tsv").write_bytes(meta.encode() if isinstance(meta, str) else meta)
    for name, text in {"r1": first, "r2": second}.items():
        if text is not None:
            (tmp_path / "repertoires" / f"{name}.tsv").write_bytes(
                text.encode() if isinstance(text, str) else text
            )
    return tmp_path


def test_files_of_others_are_read(tmp_path):
    made = read_repertoires(folder_of(tmp_path), target_column="status")
    assert made.names == ["r1", "r2"]
    assert made.labels.tolist() == [1.0, 0.0]
    assert [decode_sequences(item["data"]) for item in made] == [["ACD", "WY"], ["KKKK"]]
    assert [item["counts"].tolist() for item in made] == [[3, 0], [12]]
    assert "instance_target" not in made[0]
    other = read_repertoires(tmp_path, target_column="age", positive="4", count_column=None)
    assert other.labels.tolist() == [0.0, 1.0]
    assert [item["counts"].tolist() for item in other] == [[1, 1], [1]]


def test_other_names_of_columns_are_taken(tmp_path):
    folder_of(
        tmp_path,
        "name\tstatus\nr1\t+\nr2\t-\n",
        "cdr3\tn\nACD\t1\n",
        "n\tcdr3\n2\tWW\n",
    )
    made = read_repertoires(tmp_path, id_column="name", sequence_column="cdr3", count_column="n")
    assert made.store.counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"meta": ""}, r"metadata\.tsv: is empty"),
        ({"meta": "ID\tstatus\n"}, r"metadata\.tsv: names no repertoire"),
        (
            {"meta": "id\tstatus\nr1\t+\n"},
            r"metadata\.tsv: line 1: column 'ID' is not one of \['id', 'status'\]",
        ),
        (
            {"meta": "ID\tstate\nr1\t+\n"},
            r"metadata\.tsv: line 1: column 'status' is not .* Did you mean 'state'",
        ),
        ({"meta": "ID\tstatus\nr1\n"}, r"metadata\.tsv: line 2 has 1 cells, the header 2"),
        (
            {"meta": "ID\tstatus\nr1\t+\n\nr1.tsv\t-\n"},
            r"metadata\.tsv: line 4 names 'r1' again, after line 2",
        ),
        ({"meta": "ID\tstatus\n\t+\n"}, r"metadata\.tsv: line 2 has an empty ID"),
        (
            {"meta": "ID\tstatus\nr1\t-\nr2\t0\n"},
            r"no repertoire has '\+' in column 'status', .*\['-', '0'\]",
        ),
        ({"meta": b"ID\tstatus\n\xff\t+\n"}, r"metadata\.tsv: is not a text file"),
        ({"second": None}, r"metadata\.tsv: line 3 names 'r2', but there is no file .*r2\.tsv"),
        ({"first": ""}, r"r1\.tsv: is empty"),
        ({"first": "amino_acid\ttemplates\n"}, r"r1\.tsv: holds no sequences"),
        (
            {"first": "amino_acids\ttemplates\nA\t1\n"},
            r"r1\.tsv: line 1: column 'amino_acid' .* 'amino_acids'\?",
        ),
        ({"first": "amino_acid\nA\n"}, r"r1\.tsv: line 1: column 'templates' is not one of"),
        ({"first": "amino_acid\ttemplates\nA\t1\nC\t1\t1\n"}, r"r1\.tsv: line 3 has 3 cells, the header 2"),
        (
            {"first": "amino_acid\ttemplates\nAC\t1\n\nABC\t1\n"},
            r"r1\.tsv: line 4 holds 'B', which is none of",
        ),
        ({"first": "amino_acid\ttemplates\nac\t1\n"}, r"r1\.tsv: line 2 holds 'a'.*upper case"),
        ({"first": "amino_acid\ttemplates\n\t1\n"}, r"r1\.tsv: line 2 has an empty amino_acid"),
        (
            {"first": "amino_acid\ttemplates\nA\t-1\n"},
            r"r1\.tsv: line 2 has templates '-1', which must be a whole",
        ),
        (
            {"first": "amino_acid\ttemplates\nA\t1.5\n"},
            r"line 2 has templates '1\.5', which must be a whole number",
        ),
        ({"first": "amino_acid\ttemplates\nA\t\n"}, r"line 2 has templates '', which must be a whole number"),
        (
            {"first": "amino_acid\ttemplates\nA\t²\n"},
            r"line 2 has templates '²', which must be a whole number",
        ),
        ({"first": f"amino_acid\ttemplates\nA\t{10**19}\n"}, r"line 2 has templates '1000"),
        ({"first": "amino_acid\ttemplates\tsignal\nA\t1\t2\n"}, r"line 2 has signal '2', .* from 0 to 1"),
        ({"first": b"amino_acid\ttemplates\n\xff\t1\n"}, r"r1\.tsv: is not a text file"),
    ],
)
def test_every_bad_file_is_one_line_with_its_place(tmp_path, files, message):
    folder_of(tmp_path, **files)
    with pytest.raises(DataError, match=message) as caught:
        read_repertoires(tmp_path, target_column="status")
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_target_must_be_named_where_there_are_several(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(DataError, match=r"columns \['status', 'age'\] beside ID; give target_column="):
        read_repertoires(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_repertoires(tmp_path / "missing")


def test_signals_known_in_some_files_only_are_not_used(tmp_path):
    folder_of(tmp_path, first="amino_acid\ttemplates\tsignal\nA\t1\t1\n")
    assert "instance_target" not in read_repertoires(tmp_path, target_column="status")[0]
