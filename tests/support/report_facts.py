"""Facts of runs that never happened, for reports: small, complete, full of names that try to break out."""

from __future__ import annotations

import copy
from typing import Any

HOSTILE = (
    '"><script>alert(1)</script>',
    "</script></style></details><img src=x onerror=alert(2)>",
    "a|b\nc",
    "'; --> <!-- &amp; `code` *bold* [x](javascript:alert(3))",
    "\u202etxt.exe\x1b[31m",
)


def layer(
    name: str, median: float | None, *, role: str = "rewritten", error: float | None = 0.05
) -> dict[str, Any]:
    return {
        "name": name,
        "channels": 16,
        "rewritten": role == "rewritten",
        "control": role == "control",
        "reason": "never reached by the data" if median is None else "behind dropout",
        "downstream_of": [],
        "ratio": None if median is None else {"median": median, "min": median / 2, "max": median * 3},
        "relative_standard_error": None if median is None else {"median": error, "max": error and error * 2},
    }


def facts(layers: int = 8, names: tuple[str, ...] = (), path: str = "/runs/model.pt") -> dict[str, Any]:
    """One control layer, then rewritten ones with growing ratios; ``names`` replace the first names."""
    rows = [layer("stem.bn", 1.01, role="control")]
    rows += [layer(f"block{i}.bn", 1.1**i) for i in range(1, layers)]
    for row, name in zip(rows, names, strict=False):
        row["name"] = name
    return {
        "tool": {"name": "ckpt-tools", "version": "9.9"},
        "libraries": {"torch": "2.0"},
        "checkpoint": {"path": path, "format": "torch.save", "weights": "", "prefix": "", "sha256": "a" * 64},
        "architecture": "nets:DenseNet",
        "model_kwargs": {"drop_rate": 0.2},
        "recognised_by": "user",
        "rates": "given",
        "data": {
            "spec": "s3://KEY:SEC/RET@bucket/train.tar?token=hush",
            "kind": "folder",
            "images": 1234,
            "batches": 10,
            "batch_size": 128,
            "cut_to": None,
            "transform": "RGB",
            "input": {"origin": "options"},
            "skipped": [{"name": "torn.png", "reason": "cut short"}],
            "agreement": {
                "verdict": "agree",
                "cause": "",
                "scores": {"early": 0.01, "deep": 0.02},
                "images": 256,
            },
        },
        "estimator": "pooled",
        "statistics": "variance",
        "passes": 1,
        "stopped_early": False,
        "precision": "fp32",
        "why": "7 of 8 BN layers lie behind active dropout",
        "layers": rows,
        "controls": {
            "names": [rows[0]["name"]],
            "deviation": 0.01,
            "worst": 0.02,
            "shift": 0.03,
            "verdict": "agree",
            "reason": "",
        },
        "left_alone": [],
        "dropout_sites": [
            {"name": "drop1", "op": "dropout", "rate": 0.2, "active": True, "depth": 1},
            {"name": "drop2", "op": "dropout", "rate": None, "active": True, "depth": 3},
            {"name": "path", "op": "bernoulli_", "rate": 0.0, "active": False, "depth": None},
        ],
        "output": {"path": "/runs/model.bn.safetensors", "sha256": "b" * 64},
        "command": "ckpt-fix bn-reestimate /runs/model.pt --data /data --batch-size 128",
        "device": "cpu",
        "seconds": 12.5,
    }


def with_metrics(found: dict[str, Any]) -> dict[str, Any]:
    found["metrics"] = {
        "before": {"error": {"value": 8.97, "standard_error": 0.31}, "nll": 0.5},
        "after": {"error": {"value": 3.15, "standard_error": 0.22}, "nll": 0.25},
        "change": {"error": {"value": -5.82, "standard_error": 0.31}, "nll": -0.25},
    }
    return found


def records() -> list[dict[str, Any]]:
    """A folder of twelve: nine done, two failed, one with nothing to do; hostile names among them."""
    found = []
    for place in range(12):
        name = HOSTILE[place] if place < len(HOSTILE) else f"epoch-{place}.pt"
        report = with_metrics(facts(layers=3 + (place * 5) % 7, path=f"/sweep/{name}"))
        record = {"checkpoint": f"/sweep/{name}", "status": "done", "output": f"/out/{place}.safetensors"}
        found.append({**record, "error": None, "report": report, "seconds": 100.0 - 9 * place})
    for place, status in ((6, "failed"), (8, "failed"), (10, "nothing to do")):
        error = f"{HOSTILE[0]}: expected a checkpoint at https://me:pw@host/x?key=1, found none."
        found[place] |= {"status": status, "output": None, "error": error, "report": None}
    return copy.deepcopy(found)
