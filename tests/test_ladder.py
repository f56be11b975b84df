"""The ladder of docs/learning.md: what each rung runs, and its tables, from made-up figures."""

import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    import ladder
    import ladder_table

    yield ladder, ladder_table
    sys.path.remove(str(ROOT / "scripts" / "bench"))


def climbed(ladder, best=1):
    """Figures in which value number `best` of every grid wins and each rung is 0.01 better than the one above it."""
    figures = {"runs": [], "step_ms": {"gpt2": 740.4}, "h200": {"gpt2": {"gflops": 0.8541, "megabytes": 2.81}}}

    def add(fields, seed, score):
        averages = {str(decay): score + 0.1 for decay in ladder.EMA}
        run = {"bits_per_byte": score, "tokens": 1, "parameters": 4_300_000, "averages": averages}
        figures["runs"].append({"fields": fields | {"seed": seed}} | run)

    for n, rung in enumerate(ladder.RUNGS):
        score = 2 - 0.01 * n
        for i, rate in enumerate(rung.grid):
            add(ladder.untuned(figures, rung) | {rung.rate: rate}, ladder.SEEDS[0], score + 0.1 * (i != best))
        fields = ladder.tuned(figures, rung)
        for seed, off in zip(ladder.SEEDS, (0, 0.002, -0.002), strict=True):
            if not ladder.find(figures, fields | {"seed": seed}):
                add(fields, seed, score + off)
    return figures


def test_a_rung_takes_the_best_rates_of_the_grids_above_it(scripts):
    ladder, _ = scripts
    rung = {rung.name: rung for rung in ladder.RUNGS}
    figures = climbed(ladder)
    assert ladder.untuned(figures, rung["rope"])["optim.muon_learning_rate"] == rung["muon"].grid[1]
    last = ladder.untuned(figures, rung["normuon"])
    assert last["optim.muon_learning_rate"] == rung["momentum 0.9, betas 0.8 and 0.98, rope base 1024"].grid[1]
    assert "optim.name" in last and "optim.name" not in ladder.untuned(figures, rung["gpt2"])
    wide = ladder.untuned(figures, rung["gpt2"], {"model.n_embd": 384})
    assert (wide["model.n_embd"], wide["model.n_head"]) == (384, 6)
    assert None in ladder.untuned({"runs": []}, rung["rope"]).values()


def test_the_tables_have_a_row_for_each_rung_that_has_runs(scripts):
    ladder, tables = scripts
    figures = climbed(ladder)
    rows = tables.ladder_table(figures).splitlines()[2:]
    assert [row.split(" | ")[0].lstrip("| ") for row in rows] == [rung.name for rung in ladder.RUNGS]
    assert (
        rows[1].startswith("| gpt2 | 1.9900 | 3 | 0.0020 |")
        and "| 740 | 0.854, 2.81 | yes |" in rows[1]
        and "| 0.0014 |" in rows[1]
    )
    assert rows[2].startswith("| muon | 1.9800 | 3 | 0.0020 | +0.0100 | +5.0 | 0.01 |")
    rope = ladder.untuned(figures, next(rung for rung in ladder.RUNGS if rung.name == "rope"))
    first, second, third = (rope | {"seed": seed} for seed in ladder.SEEDS)
    figures["runs"] = [run for run in figures["runs"] if run["fields"] not in (first, third)]
    partial = tables.ladder_table(figures).splitlines()[5]
    assert partial.startswith("| rope | 1.9720 | 1 |  | +0.0100 |  |"), partial
    figures["runs"] = [run for run in figures["runs"] if run["fields"] != second]
    after = tables.ladder_table(figures).splitlines()[5]
    assert after.startswith("| rmsnorm without scale, no biases | 1.9600 | 3 | 0.0020 |  |  |"), after
    assert "(end of the grid)" in tables.ladder_table(climbed(ladder, best=0))
    assert tables.average_table(figures).splitlines()[2].endswith("| 1.9500 | 1.9500 | 1.9500 |")
    assert '"gpt2"' in tables.plot(figures) and "normuon" not in tables.plot(figures)
    figures["runs"] = []
    assert len(tables.ladder_table(figures).splitlines()) == 2 and tables.plot(figures) == ""
