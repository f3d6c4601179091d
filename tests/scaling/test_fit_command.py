"""The command line that fits any table: what it prints, refuses, writes and returns."""

import numpy as np
import pytest

from recscale.scaling import fit
from recscale.scaling.law_file import load_law

TRUTH = {"E": 2.0, "A_params": 300.0, "A_tokens": 900.0, "alpha_params": 0.34, "alpha_tokens": 0.36}
SHAPE = ("--x", "params", "tokens", "--y", "loss", "--draws", "200")


def planted(params, tokens):
    return 2.0 + 300.0 * params**-0.34 + 900.0 * tokens**-0.36


@pytest.fixture
def table(tmp_path):
    """36 runs of a known law with .05 % noise, one diverged, two held out."""
    rng = np.random.default_rng(0)
    lines = ["run,params,tokens,loss,rung"]
    for i in range(6):
        for j in range(6):
            params, tokens = 1e6 * 3.0**i, 1e8 * 3.0**j
            loss = planted(params, tokens) * (1 + 5e-4 * rng.standard_normal())
            lines.append(f"r{i}{j},{params},{tokens},{loss},grid")
    lines.append("bad,1e6,1e8,nan,grid")
    lines += [f"top{i},1e9,{tokens},{planted(1e9, tokens)},top" for i, tokens in enumerate((1e11, 2e11))]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_law_is_printed_whole_and_written(table, tmp_path, capsys):
    out = tmp_path / "law.json"
    ask = ["--where", "loss<9", "--held-out", "rung=top", "--out", str(out)]
    place = ["--predict", f"params=2e8,tokens=1e10,loss={planted(2e8, 1e10)}", "--project", "params=1e9,tokens=1e11"]
    assert fit.main([str(table), *SHAPE, *ask, *place]) == 0
    text = capsys.readouterr().out
    assert "E + sum_j A_j x_j^-alpha_j" in text and "certificate: yes" in text and "additive preferred" in text
    assert "bad: loss is nan, not < 9" in text and "36 points" in text
    assert "held out: 2 runs" in text and "the next doubling of tokens lowers loss by" in text
    assert "inside. 1 runs" in text and "decades beyond the data: no run was made here" in text
    law = load_law(out)
    assert law.n == 36
    for name, value in TRUTH.items():
        assert abs(law.params[name] / value - 1) < (0.5 if name[0] == "A" else 0.05)
        assert f"{law.params[name]:.8g}" in text and (name[0] == "A" or law.verdicts[name] in text)


def test_a_metric_that_rises_is_said_to_rise(tmp_path, capsys):
    users = [1000.0 * 2**i for i in range(10)]
    lines = ["users,hr@10", *(f"{n},{0.1 - 1.5 * n**-0.4 + 1e-4 * (-1) ** i}" for i, n in enumerate(users))]
    (tmp_path / "rising.csv").write_text("\n".join(lines) + "\n")
    asked = ["--x", "users", "--y", "hr@10", "--form", "ceiling", "--scale", "identity"]
    assert fit.main([str(tmp_path / "rising.csv"), *asked]) == 0
    assert "the next doubling of users raises hr@10 by 0.00" in capsys.readouterr().out


def test_bad_input_is_said_line_by_line(table, capsys):
    assert fit.main([str(table), "--x", "params", "token", "--y", "loss"]) == fit.BAD_INPUT
    assert "no column 'token'; the nearest it has: tokens" in capsys.readouterr().err
    assert fit.main([str(table), *SHAPE]) == fit.BAD_INPUT
    assert "line 38: loss is nan, expected a finite number" in capsys.readouterr().err
    assert fit.main([str(table), *SHAPE, "--where", "loss<2.4"]) == fit.BAD_INPUT
    assert "a form with 5 parameters needs 15" in capsys.readouterr().err
    assert fit.main(["nowhere.csv", *SHAPE]) == fit.BAD_INPUT
    assert capsys.readouterr().err == "error: nowhere.csv: found no such file or folder\n"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--form", "additiv"], "--form: found 'additiv'; the nearest known: additive"),
        (["--form", "pow_floor"], "--form pow_floor: takes 1 axes, found 2 in --x"),
        (["--delta", "much"], "delta: found 'much', expected a number above 0, seed, lsq or lad"),
        (["--held-out", "rung"], "--held-out: found 'rung', expected COLUMN=VALUE"),
        (["--where", "loss"], "found 'loss', expected COLUMN SIGN VALUE"),
        (["--draws", "20"], "draws: found 20"),
        (["--x", "params", "params"], "--x, --y: params is named twice"),
        (["--project", "params=0,tokens=1e9"], "sizes: found 'params=0', expected a size above 0"),
        (["--predict", "params=-1e6,tokens=1e9,loss=2"], "sizes: found 'params=-1e6', expected a size above 0"),
        (["--project", "params=1e9"], "lacks tokens"),
        (["--project", "params=1e9,size=3"], "found 'size=3', expected NAME=NUMBER with a name of params, tokens"),
        (["--predict", "params=1e9,tokens=1e9"], "--predict: no loss=...; give what the run measured"),
        (["--map", "columns.yaml"], "columns.yaml"),
    ],
)
def test_a_bad_option_is_said(table, capsys, more, word):
    assert fit.main([str(table), *SHAPE, "--where", "loss<9", *more]) == fit.BAD_INPUT
    error = capsys.readouterr().err
    assert word in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_projection_too_far_is_refused_unless_forced(table, capsys):
    far = [str(table), *SHAPE, "--where", "loss<9", "--project", "params=1e12,tokens=1e11"]
    assert fit.main(far) == fit.BAD_INPUT
    assert "a law speaks for at most 1.5" in capsys.readouterr().err
    assert fit.main([*far, "--force"]) == 0
    assert "(forced)" in capsys.readouterr().out


def test_a_law_that_is_not_carried_is_status_3_and_told_what_would_carry_it(tmp_path, capsys):
    rng = np.random.default_rng(3)
    lines = ["n,loss", *(f"{n},{3.0 + 0.1 * np.log(n) + 1e-4 * rng.standard_normal()}" for n in np.geomspace(1, 8, 12))]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    ask = [str(tmp_path / "runs.csv"), "--x", "n", "--y", "loss", "--form", "pow_floor", "--draws", "200"]
    assert fit.main([*ask, "--out", str(tmp_path / "law.json")]) == fit.UNCERTIFIED
    text = capsys.readouterr().out
    assert "NOT CERTIFIED" in text and "What would make it carry:" in text
    assert "a wider n: 0.90 decades; 1.5 would be 1 to 31.6" in text
    assert not (tmp_path / "law.json").exists()
    assert fit.main([*ask, "--out", str(tmp_path / "runs.csv" / "law.json"), "--force"]) == fit.BAD_INPUT
    assert "error: --out: " in capsys.readouterr().err
    assert fit.main([*ask, "--out", str(tmp_path / "law.json"), "--force"]) == fit.UNCERTIFIED
    assert not load_law(tmp_path / "law.json").certified


def test_a_mapping_names_the_columns_of_a_tracker(table, tmp_path, capsys):
    columns = tmp_path / "columns.yaml"
    columns.write_text("N: params\nD: tokens\nnats: loss\n")
    ask = ["--x", "N", "D", "--y", "nats", "--draws", "200", "--map", str(columns), "--where", "nats<9"]
    assert fit.main([str(table), *ask]) == 0
    assert "alpha_D" in capsys.readouterr().out
    columns.write_text("- N\n")
    assert fit.main([str(table), *ask]) == fit.BAD_INPUT
    assert "expected lines of NAME: COLUMN" in capsys.readouterr().err
