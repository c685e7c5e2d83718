"""Batches of tokens from files in a row, against the array that was cut into them."""

import pickle

import numpy as np
import pytest
import torch

from stagewise.checkpoints import CheckpointError, TokenBatches

TOKENS = np.random.default_rng(0).integers(0, 50_304, size=5 * 2 * 3 + 4, dtype=np.uint16)


def cut(folder, *edges):
    """The tokens in files that end at these bytes."""
    raw = TOKENS.astype("<u2").tobytes()
    files = []
    for start, stop in zip((0, *edges), (*edges, len(raw)), strict=True):
        files.append(folder / f"document-{len(files):05d}.bin")
        files[-1].write_bytes(raw[start:stop])
    return files


@pytest.mark.parametrize("edges", [(), (12,), (20, 24), (7, 31), (1, 2, 3, 60)])
def test_batches_are_those_of_the_whole_wherever_files_end(tmp_path, edges):
    batches = TokenBatches.of_files(cut(tmp_path, *edges), batch_size=2, length=3)
    assert len(batches) == 5  # the rest is no whole batch
    for step in range(5):
        expected = TOKENS[6 * step : 6 * step + 6].reshape(2, 3).astype(np.int64)
        assert torch.equal(batches[step], torch.from_numpy(expected)), step
    assert torch.equal(pickle.loads(pickle.dumps(batches))[4], batches[4])


def test_a_step_of_pythia_has_the_published_number_of_bytes(tmp_path):
    assert TokenBatches.of_files(cut(tmp_path)).bytes_per_update == 4_196_352


@pytest.mark.parametrize("step", [-1, 5])
def test_steps_beyond_the_files_are_refused(tmp_path, step):
    with pytest.raises(IndexError, match=rf"step {step}; the files hold those of steps 0 to 4"):
        TokenBatches.of_files(cut(tmp_path), batch_size=2, length=3)[step]


def test_missing_files_and_sizes_are_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file of tokens: .*gone.bin"):
        TokenBatches.of_files([tmp_path / "gone.bin"])
    with pytest.raises(ValueError, match="tokens need a file and positive sizes"):
        TokenBatches.of_files([])
    with pytest.raises(ValueError, match="positive sizes"):
        TokenBatches.of_files(cut(tmp_path), batch_size=0)
