"""Runs of any tracker become the same table; what is wrong with a table is said line by line, all of it at once."""

import json
import struct

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from recscale.scaling import sources_trackers
from recscale.scaling.sources import BadTable, number, read_table
from recscale.scaling.sources_points import Choice, Condition, points_of
from tests.scaling import synthetic_study as records

GOOD = [(f"r{i}", 10.0 ** (i % 4 + 3), 10.0 ** (i // 4 + 5), 3.0 + 0.1 * i) for i in range(16)]
AXES = Choice({"params": "params", "tokens": "tokens"}, "loss")


def csv_file(path, rows=GOOD, header="run,params,tokens,loss", mark=","):
    lines = [header, *(mark.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def problems(path, choice=AXES, mapping=None):
    """Problem lines of a table, without the name of the file."""
    with pytest.raises(BadTable) as caught:
        points_of(read_table(path, mapping), choice)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    assert all(line.startswith(str(path)) for line in caught.value.problems)
    return [line.removeprefix(str(path)).removeprefix(", ").removeprefix(": ") for line in caught.value.problems]


def test_a_csv_and_a_parquet_give_the_same_points(tmp_path):
    table = pyarrow.Table.from_pylist(
        [dict(zip(("run", "params", "tokens", "loss"), row, strict=True)) for row in GOOD]
    )
    parquet.write_table(table, tmp_path / "runs.parquet")
    made = [
        points_of(read_table(path), AXES)[0] for path in (csv_file(tmp_path / "runs.csv"), tmp_path / "runs.parquet")
    ]
    assert made[0].data_hash == made[1].data_hash and made[0].run_N == tuple(row[0] for row in GOOD)
    np.testing.assert_array_equal(made[0].y_N, [row[3] for row in GOOD])
    np.testing.assert_array_equal(made[0].x["tokens"], [row[2] for row in GOOD])


def test_every_problem_of_a_table_is_a_line_with_its_row(tmp_path):
    rows = [list(row) for row in GOOD]
    rows[1][3], rows[2][3], rows[3][1], rows[4][2], rows[5][3], rows[6][0], rows[7][1] = (
        *("nan", "inf", "many", 0, ""),
        *("r0", -5),
    )
    found = problems(csv_file(tmp_path / "runs.csv", rows))
    assert found == [
        "line 5: params is 'many', expected a number",
        "line 9: params is -5, expected a size above 0",
        "line 6: tokens is 0, expected a size above 0",
        "line 3: loss is nan, expected a finite number: a diverged run is no point, leave it out",
        "line 4: loss is inf, expected a finite number: a diverged run is no point, leave it out",
        "line 7: loss is empty, expected a number",
        "line 8: run 'r0' stands on line 2 already: a run is one row",
    ]


def test_a_missing_column_names_the_nearest_it_has(tmp_path):
    path = csv_file(tmp_path / "runs.csv")
    found = problems(path, Choice({"params": "parms", "tokens": "tokens"}, "los", lineage="trunk"))
    assert found[0].startswith("no column 'parms'; the nearest it has: params, ")
    assert found[1].startswith("no column 'los'; the nearest it has: loss, ") and "'trunk'" in found[2]
    (line,) = problems(path, mapping={"size": "Params"})
    assert "no column 'Params'; the nearest it has: params" in line


def test_too_few_points_for_the_form_are_counted_with_what_was_left_out(tmp_path):
    choice = Choice(AXES.x, "loss", where=(Condition.of("loss<3.25"),), parameters=5)
    (line,) = problems(csv_file(tmp_path / "runs.csv"), choice)
    assert line == "3 points to fit, 13 runs are left out; a form with 5 parameters needs 15"


def test_many_bad_rows_of_a_column_do_not_fill_the_screen(tmp_path):
    rows = [(f"r{i}", "x", 1e6, 3.0) for i in range(100)]
    found = problems(csv_file(tmp_path / "runs.csv", rows))
    assert len(found) == 21 and found[-1] == "params: 80 more rows like these"


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("runs.csv", b"", "found no runs"),
        ("runs.csv", b"run,params\n", "found no runs"),
        ("runs.csv", b"run;params;loss\na;1;2\n", "separated by ';', expected commas"),
        ("runs.csv", b"run,loss,loss\na,1,2\n", "column 'loss' occurs 2 times"),
        ("runs.csv", b"run,params,loss\na,1\n", "line 2: 2 cells, the header has 3"),
        ("runs.csv", b"\xff\xfe\x00", "cannot be read"),
        ("runs.csv", b'run,loss\n"a,1\n', "cannot be read"),
        ("runs.parquet", b"run,params\n", "cannot be read"),
        ("runs.txt", b"run\n", "found the ending '.txt', expected .csv, .parquet or .jsonl"),
        ("runs.jsonl", b'{"run": "a"}\nrun b\n', "runs.jsonl:2: not JSON"),
        ("runs.jsonl", b"[1]\n", "found a list, expected one object per line"),
        ("runs.csv", b"Step,a - loss,a - loss__MIN\n1,2,2\n", "a W&B chart, which holds no sizes"),
        ("loss.csv", b"Wall time,Step,Value\n1.5,1,2\n", "one chart of one run"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadTable, match=word.replace("(", r"\(")) as caught:
        read_table(tmp_path / name)
    assert len(caught.value.problems) == 1 and name in str(caught.value)


def test_a_missing_path_and_a_folder_of_something_else_say_so(tmp_path):
    with pytest.raises(BadTable, match="found no such file or folder"):
        read_table(tmp_path / "nothing.csv")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(BadTable, match="found no runs in this folder, expected run records"):
        read_table(tmp_path)


def test_a_byte_order_mark_and_spaces_do_no_harm(tmp_path):
    (tmp_path / "runs.csv").write_text("﻿run,params\n a , 1e6 \n")
    (row,) = read_table(tmp_path / "runs.csv").rows
    assert row == {"run": "a", "params": "1e6"}


def test_conditions_choose_rows_and_say_which_they_left(tmp_path):
    rows = [*GOOD, ("bad", 1e3, 1e5, "nan")]
    choice = Choice(AXES.x, "loss", where=(Condition.of("loss < 4.0"),), held_out=Condition("params", "==", "1e6"))
    points, left = points_of(read_table(csv_file(tmp_path / "runs.csv", rows)), choice)
    assert {run.run for run in left} == {"bad", "r10", "r11", "r12", "r13", "r14", "r15"}
    assert left[-1].reason == "loss is nan, not < 4.0"
    np.testing.assert_array_equal(points.held_out_N, points.x["params"] == 1e6)
    (line,) = problems(
        tmp_path / "runs.csv", Choice(AXES.x, "loss", where=choice.where, held_out=Condition.of("run==x"))
    )
    assert "no run has run == x: nothing is held out" in line
    with pytest.raises(ValueError, match="expected COLUMN SIGN VALUE"):
        Condition.of("loss")


def test_rows_of_equal_sizes_tell_the_noise(tmp_path):
    rows = [(f"{name}-{seed}", *rest[:2], rest[2] + 0.02 * seed) for name, *rest in GOOD for seed in (0, 1)]
    header = "run,params,tokens,loss"
    points, _ = points_of(read_table(csv_file(tmp_path / "a.csv", rows, header)), Choice(AXES.x, "loss", seed="run"))
    np.testing.assert_allclose(points.sigma_N, 0.02 / np.sqrt(2))
    assert points.sigma_dof == 16
    alone, _ = points_of(read_table(csv_file(tmp_path / "b.csv")), Choice(AXES.x, "loss", seed="run"))
    assert alone.sigma_N is None


NUMBERS = {"1e9": 1e9, " 3.5 ": 3.5, ".5": 0.5, "-2": -2.0, 7: 7.0, "inf": np.inf}


@pytest.mark.parametrize("value", [*NUMBERS, "1_000", "1,000", "", "0x10", True, None])
def test_a_number_is_what_reads_as_one(value):
    assert number(value) == (None if value is True else NUMBERS.get(value))


def test_the_run_table_of_wandb(tmp_path):
    header = '"Name","State","Notes","User","Tags","Created","Runtime","Sweep","n_params","tokens","eval/loss"'
    rows = [(f"sun-{i}", "finished", "-", "u", "", "2026", "9", "", p, d, y) for i, (_, p, d, y) in enumerate(GOOD)]
    rows.append(("rain-1", "crashed", "-", "u", "", "2026", "9", "", 1e3, 1e5, ""))
    table = read_table(
        csv_file(tmp_path / "w.csv", rows, header), {"params": "n_params", "loss": "eval/loss", "tokens": "tokens"}
    )
    points, left = points_of(table, AXES)
    assert table.kind == "W&B run table" and len(points) == 16 and points.run_N[0] == "sun-0"
    assert [(run.run, run.reason) for run in left] == [("rain-1", "State is crashed, not finished")]


def test_the_histories_of_wandb(tmp_path):
    for name, loss in (("a", 3.0), ("b", 2.5)):
        rows = [{"_step": 2, "loss": loss, "config": {"n": 7}}, {"_step": 1, "loss": 9.0}, {"_step": 3, "loss": None}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = read_table(tmp_path)
    assert table.kind == "histories" and table.places == ("run a", "run b")
    assert [row["loss"] for row in table.rows] == [3.0, 2.5] and table.rows[0]["config.n"] == 7
    (tmp_path / "plain.jsonl").write_text('{"run": "x", "loss": 1.0}\n{"run": "y", "loss": 2.0}\n')
    assert [row["run"] for row in read_table(tmp_path / "plain.jsonl").rows] == ["x", "y"]


def mlflow_run(folder, name, status, loss, stage="active"):
    run = folder / "7" / name
    for part in ("metrics/val", "params", "tags"):
        (run / part).mkdir(parents=True)
    (run / "meta.yaml").write_text(f"run_id: {name}\nrun_name: of {name}\nstatus: {status}\nlifecycle_stage: {stage}\n")
    (run / "metrics" / "val" / "loss").write_text(f"100 9.0 0\n300 {loss} 20\n200 5.0 10\n")
    (run / "params" / "n").write_text("1e6")
    (run / "tags" / "who").write_text("me\n")


def test_the_store_of_mlflow(tmp_path):
    mlflow_run(tmp_path, "aa", 3, 2.5)
    mlflow_run(tmp_path, "bb", 4, 2.6)
    mlflow_run(tmp_path, "cc", 3, 2.7, stage="deleted")
    (tmp_path / "7" / "meta.yaml").write_text("experiment_id: '7'\nname: e\n")
    table = read_table(tmp_path, {"loss": "metrics.val/loss", "n": "params.n"})
    (row,) = table.rows
    assert table.kind == "MLflow store" and (row["loss"], row["n"], row["tags.who"]) == (2.5, "1e6", "me")
    assert [(run.run, run.reason) for run in table.excluded] == [("bb", "status is FAILED, not FINISHED")]
    (tmp_path / "7" / "aa" / "metrics" / "val" / "loss").write_text("100 nine 0\n")
    with pytest.raises(BadTable, match="loss:1: found '100 nine 0', expected 'milliseconds value step'"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("run_id,experiment_id,status,params.n,metrics.loss", "MLflow run table"),
        ("Run ID,Duration,Status,n,loss", "MLflow page"),
    ],
)
def test_the_tables_of_mlflow(tmp_path, header, kind):
    rows = [("a", 1, "FINISHED", 1e6, 2.5), ("b", 1, "RUNNING", 1e6, 2.6)]
    table = read_table(csv_file(tmp_path / "m.csv", rows, header))
    assert table.kind == kind and [run.run for run in table.excluded] == ["b"] and len(table.rows) == 1
    with pytest.raises(BadTable, match="none of 1 runs has"):
        read_table(csv_file(tmp_path / "m.csv", rows[1:], header))


def varint(value):
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def field(number, content):
    """One field of a protobuf message: an int as varint, a float as 4 bytes, bytes as they are."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    if isinstance(content, float):
        return varint(number << 3 | 5) + struct.pack("<f", content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def event(step, *values):
    body = field(2, step) + field(5, b"".join(field(1, value) for value in values))
    header = struct.pack("<Q", len(body))
    return header + struct.pack("<I", sources_trackers._masked_crc(header)) + body + b"\0\0\0\0"


def scalar(tag, value):
    return field(1, tag.encode()) + field(2, value)


def tensor(tag, value):
    return field(1, tag.encode()) + field(8, field(1, 1) + field(4, struct.pack("<f", value)))


def hparams(**values):
    entry = b"".join(
        field(1, field(1, name.encode()) + field(2, varint(2 << 3 | 1) + struct.pack("<d", value)))
        for name, value in values.items()
    )
    plugin = field(1, b"hparams") + field(2, field(3, entry))
    return field(1, b"_hparams_/session_start_info") + field(9, field(1, plugin))


def test_the_event_files_of_tensorboard(tmp_path):
    for name, loss in (("a", 2.5), ("b", 3.5)):
        (tmp_path / name).mkdir()
        content = (
            event(0, hparams(params=1e6)) + event(300, scalar("eval/loss", loss)) + event(1, tensor("tokens", 8.0))
        )
        content += event(200, scalar("eval/loss", 9.0)) + event(400, scalar("eval/loss", 1.0))[:-9]
        (tmp_path / name / "events.out.tfevents.1.host").write_bytes(content)
    table = read_table(tmp_path, {"loss": "eval/loss"})
    assert table.kind == "TensorBoard" and [row["run"] for row in table.rows] == ["a", "b"]
    assert [row["loss"] for row in table.rows] == [2.5, 3.5]
    assert table.rows[0]["hparams.params"] == 1e6 and table.rows[0]["tokens"] == 8.0 and table.rows[0]["step"] == 300


def test_a_damaged_event_file_is_named(tmp_path):
    content = bytearray(event(1, scalar("loss", 2.0)))
    content[2] ^= 1
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    with pytest.raises(BadTable, match=r"tfevents\.1: damaged, not a TensorBoard event file"):
        read_table(tmp_path)


def test_the_checksum_is_crc32c():
    crc = 0xE3069283  # of "123456789": RFC 3720, appendix B.4
    assert sources_trackers._masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_charts_of_tensorboard(tmp_path):
    header = "Wall time,Step,Value"
    for run, loss in (("a", 2.5), ("b_1", 3.5)):
        csv_file(tmp_path / f"run-{run}-tag-eval_loss.csv", [(1.5, 10, 9.0), (2.5, 20, loss)], header)
        csv_file(tmp_path / f"run-{run}-tag-tokens.csv", [(1.5, 20, 1e6)], header)
    table = read_table(tmp_path)
    assert table.kind == "TensorBoard" and [row["run"] for row in table.rows] == ["a", "b_1"]
    assert [(row["eval_loss"], row["tokens"], row["step"]) for row in table.rows] == [(2.5, 1e6, 20), (3.5, 1e6, 20)]


def test_our_own_run_records_are_a_source_too(tmp_path):
    records.write_study(tmp_path)
    table = read_table(tmp_path, {"users": "cell.coordinates.users", "loss": "eval.test.all.nats"})
    assert table.kind == "run records" and len(table.excluded) == 2
    points, left = points_of(table, Choice({"users": "users"}, "loss"))
    assert len(points) == len(table.rows) and len(left) == 2


def test_a_run_without_a_name_is_told_and_one_without_a_trajectory_is_its_own(tmp_path):
    rows = [(*row, "" if row[0] in ("r2", "r3") else "trunk") for row in GOOD]
    path = csv_file(tmp_path / "runs.csv", rows, "run,params,tokens,loss,trunk")
    points, _ = points_of(read_table(path), Choice({"params": "params", "tokens": "tokens"}, "loss", lineage="trunk"))
    assert set(points.lineage_N) == {"trunk", "r2", "r3"}
    unnamed = [("" if row[0] in ("r2", "r3") else row[0], *row[1:]) for row in GOOD]
    told = ["line 4: run is empty, expected the name of the run", "line 5: run is empty, expected the name of the run"]
    assert problems(csv_file(tmp_path / "runs.csv", unnamed)) == told


def test_damaged_exports_of_trackers_name_their_file(tmp_path):
    for name in ("steps", "bytes", "mlruns"):
        (tmp_path / name).mkdir()
    (tmp_path / "steps" / "a.jsonl").write_text('{"_step": "one", "loss": 3}\n')
    assert problems(tmp_path / "steps") == ["/a.jsonl:1: _step is 'one', expected a number"]
    (tmp_path / "bytes" / "a.jsonl").write_bytes(b"\xff")
    assert problems(tmp_path / "bytes") == ["/a.jsonl: not UTF-8 text (invalid start byte at byte 0)"]
    (tmp_path / "mlruns" / "meta.yaml").write_text("run_id: r1\nstatus: [3]\n")
    assert problems(tmp_path / "mlruns") == ["none of 1 runs has status = FINISHED"]


def test_records_that_are_all_left_out_say_why(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.json").write_text("{")
    (line,) = problems(tmp_path)
    assert line.startswith("all 1 runs (run records) are left out, the first ")
