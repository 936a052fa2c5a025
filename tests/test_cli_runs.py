"""``epochal runs ls`` and ``show``: from files alone, and whatever state these are in."""

import json
from pathlib import Path

import pytest

RUN = {
    "status": "ended", "started": "2026-03-01T12:30:45+0100", "reason": "early_stopping",
    "message": "early stopping: val_loss has not improved for 2 evaluations",
    "best": {"epoch": 2, "step": 20, "metric": "val_loss", "value": 0.25},
    "monitor": "val_loss", "seed": 0, "header": {"model": "MLP, 17 parameters", "run": "elsewhere/a-1"},
    "environment": {"torch": "2.13.0"}, "restored": True, "epochs": 4, "steps": 40, "seconds": 1.5,
}  # fmt: skip
RESULTS = """\
epoch,step,lr,time,train_loss,val_loss
1,10,0.1,0.25,1.0,0.5
2,20,0.1,0.5,0.5,0.25
3,30,0.1,0.75,0.25,nan
4,40,0.1,1.0,0.125,0.375
"""


@pytest.fixture
def runs():
    """A whole run, one without a run.json, one that trains, and three that are damaged."""
    folders = {
        "a-1": RUN,
        "b-1": {
            **RUN,
            "status": "running",
            "reason": None,
            "message": None,
            "best": None,
            "started": "2026-03-02T08:00:00",
        },
        "c-damaged": "{",
        "d-damaged": [1, 2],
        "e-damaged": {**RUN, "best": {"epoch": 1}},
        "f-incomplete": None,
    }
    for name, facts in folders.items():
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        if facts is not None:
            (folder / "run.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    Path("runs/a-1/results.csv").write_text(RESULTS)
    Path("runs/b-1/results.csv").write_text("epoch,train_loss\n1\n")
    Path("runs/f-incomplete/checkpoints").mkdir()
    Path("runs/.hidden").mkdir()
    Path("runs/photos").mkdir()
    Path("runs/note.txt").write_text("")


def test_ls(command, runs):
    assert command("runs", "ls") == (
        0,
        """\
run                status          best                      started
runs/c-damaged     damaged
runs/d-damaged     damaged
runs/e-damaged     damaged
runs/f-incomplete  incomplete
runs/a-1           early stopping  epoch 2, val_loss 0.2500  2026-03-01 12:30
runs/b-1           stopped                                   2026-03-02 08:00
""",
        "",
    )


def test_ls_as_json(command, runs):
    code, out, _ = command("runs", "ls", "runs", "--json")
    listed = {one["run"]: one for one in json.loads(out)}
    assert code == 0 and len(listed) == 6
    told = ("status", "reason", "message", "started", "best", "monitor", "epochs", "steps", "seconds", "seed", "header")
    assert listed["runs/a-1"] == {
        "run": "runs/a-1",
        **dict.fromkeys(("command", "where", "fix")),
        **{name: RUN[name] for name in told},
    }
    assert {name: one["message"] for name, one in listed.items() if one["status"] != "ended"} == {
        "runs/b-1": None,
        "runs/c-damaged": "run.json cannot be read: JSONDecodeError('Expecting property name enclosed in double"
        " quotes: line 1 column 2 (char 1)')",
        "runs/d-damaged": "run.json cannot be read: AttributeError(\"'list' object has no attribute 'get'\")",
        "runs/e-damaged": "run.json cannot be read: KeyError('value')",
        "runs/f-incomplete": "there is no run.json",
    }


def test_ls_of_nothing(command):
    assert command("runs", "ls") == (
        1,
        "",
        """\
RunFolderError: there is no such folder.
  where: runs
  fix:   name a folder of runs, or make a first one with epochal demo
""",
    )
    Path("empty").mkdir()
    assert command("runs", "ls", "empty") == (0, "no runs in empty\n", "")
    assert command("runs", "ls", "empty", "--json") == (0, "[]\n", "")


def test_show(command, runs):
    assert command("runs", "show", "runs/a-1") == (
        0,
        """\
run         runs/a-1
status      early stopping
message     early stopping: val_loss has not improved for 2 evaluations
started     2026-03-01 12:30
best        epoch 2, val_loss 0.2500
model       MLP, 17 parameters
train_loss  █▄▂▁
val_loss    █▁ ▄
last        epoch 4, step 40, lr 0.1000, time 1.0000, train_loss 0.1250, val_loss 0.3750
files       results.csv, run.json
""",
        "",
    )
    Path("runs/a-1/table.json").write_text("")
    assert command("runs", "show", "runs/a-1")[1].endswith("next        epochal predict runs/a-1 NEW.csv -o OUT.csv\n")


def test_show_as_json(command, runs):
    code, out, _ = command("runs", "show", "runs/a-1", "--json")
    shown = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and shown["best"] == RUN["best"] and shown["files"] == ["results.csv", "run.json"]
    assert [row["val_loss"] for row in shown["rows"]] == [0.5, 0.25, "nan", 0.375]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "f-incomplete",
            "run      runs/f-incomplete\nstatus   incomplete\nmessage  there is no run.json\nfiles    checkpoints/\n",
        ),
        (
            "e-damaged",
            "run      runs/e-damaged\nstatus   damaged\nmessage  run.json cannot be read: KeyError('value')\n"
            "files    run.json\n",
        ),
        (
            "b-1",
            "run      runs/b-1\nstatus   stopped\nstarted  2026-03-02 08:00\nmodel    MLP, 17 parameters\n"
            "files    results.csv, run.json\n",
        ),
    ],
)
def test_show_a_run_that_is_not_whole(command, runs, name, text):
    assert command("runs", "show", f"runs/{name}") == (0, text, "")


def test_show_no_run(command, runs):
    assert command("runs", "show", "runs/a-2") == (
        1,
        "",
        """\
RunFolderError: there is no such run folder.
  where: runs/a-2
  fix:   did you mean runs/a-1?
""",
    )
    Path("photos").mkdir()
    code, out, err = command("runs", "show", "photos")
    assert (code, out) == (1, "") and err.startswith(
        "RunFolderError: there is no run in the folder.\n  where: photos\n"
    )
    assert command("runs", "show", "elsewhere/x")[2].endswith(
        "  fix:   epochal runs ls FOLDER lists those in a folder\n"
    )
