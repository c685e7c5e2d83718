"""Score folders as other tools write them, byte for byte, without the tools."""

import json

import numpy as np
import torch
import yaml


def bergson(
    folder, scores, kind="float32", config="score_cfg", unwritten=(), offsets=None, candidates=None, **settings
):
    """As ``bergson score`` of versions 0.26.0 to 2.5.1 does.

    bergson/score/score_writer.py: ``_score_struct_dtype``, ``MemmapSequenceScoreWriter``, ``MemmapTokenScoreWriter``;
    bergson/config/config_io.py: ``save_run_config``; bergson/score/score.py: ``candidates.npy``.
    """
    folder.mkdir(parents=True)
    rows, columns = scores.shape
    size = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[kind]
    pair = 1 << size.bit_length()  # a score and its flag, up to a power of two
    layout = {
        "names": [name for k in range(columns) for name in (f"score_{k}", f"written_{k}")],
        "formats": [kind, "bool"] * columns,
        "offsets": [offset for k in range(columns) for offset in (k * pair, k * pair + size)],
        "itemsize": (columns * pair + 7) // 8 * 8,
    }
    content = np.zeros((rows, layout["itemsize"]), np.uint8)
    for k in range(columns):
        column = torch.tensor(scores[:, k]).to(getattr(torch, kind))
        content[:, k * pair : k * pair + size] = column.view(torch.uint8).view(rows, size).numpy()
        content[:, k * pair + size] = [row not in unwritten for row in range(rows)]
    (folder / "scores.bin").write_bytes(content.tobytes())
    items = rows if offsets is None else len(offsets) - 1
    counts = {"num_items": items, "num_rows": rows, "num_scores": columns}
    info = {"attribute_tokens": offsets is not None} | counts | {"dtype": layout}
    (folder / "info.json").write_text(json.dumps(info, indent=2))
    if offsets is not None:
        np.save(folder / "offsets.npy", np.array(offsets, np.int64))
    if candidates is not None:
        np.save(folder / "candidates.npy", np.array(candidates, np.int64))
    if config:
        settings = {"query_path": "query", "score": "individual", "higher_is_better": True} | settings
        step = {"score": {config: settings, "index_cfg": {"run_path": "scores"}}}
        about = {"bergson_version": "2.5.1", "created": "2026-10-01T00:00:00+00:00"}
        (folder / "config.yaml").write_text(yaml.safe_dump({"steps": [step], "metadata": about}, sort_keys=False))
    return folder


def dattri(folder, scores, train_ids, steps, test_ids):
    """As ``AttributionScore.save`` of dattri-llm 0.1.0 does (dattri_llm/attribution/score.py)."""
    folder.mkdir(parents=True)
    torch.save(torch.tensor(scores, dtype=torch.float32), folder / "scores.pt")
    meta = {
        "row_train_ids": train_ids,
        "row_steps": steps,
        "test_ids": test_ids,
        "algorithm": "TracIn",
        "algorithm_meta": {"normalized_grad": False},
        "layer_name": None,
        "row_token_ids": None,
        "granularity": "instance",
        "num_train": len(set(train_ids)),
        "num_test": len(test_ids),
        "num_rows": len(train_ids),
    }
    (folder / "metadata.json").write_text(json.dumps(meta, indent=2))
    return folder
