"""What a worker does for a cell of a stage."""

from dataclasses import replace

from end_to_end.tiny import write_run
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run.config import load_config
from stagewise.run.opened import open_run
from stagewise.run.progress import silent


def test_a_cell_at_one_checkpoint_reads_no_other(tmp_path):
    """As many bytes as the whole run would be read for every cell, on every machine."""
    opened = open_run(load_config(write_run(tmp_path, estimators=["exact", "gradient"])), silent)
    run, seen = opened.work.trajectory, []
    watched = Trajectory(run.steps, lambda step: (seen.append(step), run.load(step))[1])
    cells = [cell for cell in opened.cells if cell.step == 20]
    assert {cell.stage for cell in cells} == {"exact influence", "gradient product", "retraining windows"}
    for cell in cells:
        replace(opened.work, trajectory=watched).compute(opened.task, cell)
        assert opened.work.is_complete(cell)
    assert set(seen) == {20}
