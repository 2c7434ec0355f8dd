"""Read finished runs: their settings, what each network came to, and their curves.

python -m kdlab -m experiment=kd_resnet loss.temperature=1,4 epochs=3
python examples/read_runs.py outputs/kd_resnet
"""

import sys

from kdlab.runs.read import load


def main(*folders: str) -> list[str]:
    """Return a line for each run, the best on validation first."""
    runs = [run for run in load(folders) if not run.failed]
    runs.sort(key=lambda run: -(run.number(run.subject, "val", "acc") or 0.0))
    lines = []
    for run in runs:
        own, alone = (run.number(role, "test", "acc") for role in (run.subject, "baseline"))
        steps, values = run.curves.get("train/loss", ([], []))
        gain = "" if own is None or alone is None else f", {100 * (own - alone):+.1f} points to the baseline"
        last = f", last train loss {values[-1]:.3f} at step {steps[-1]:.0f}" if values else ""
        temperature = run.settings.get("loss.temperature")
        lines.append(f"{run.label}: T={temperature}, test accuracy {own or 0.0:.1%}{gain}{last}")
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["outputs"]))
