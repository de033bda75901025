# %% [markdown]
# # arc_solver
# Fine-tunes a small language model on each task's own demonstrations, asks it under many views, and votes. Made by
# `bin/submit`; the next cell says from which content.

# %%
# What was built is what is mounted, byte for byte, wherever it is mounted.
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()
RELEASE = json.loads("{}")  # filled in when it is built: hash of the manifest, and names
RERUN = bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))  # the run that is scored, on the hidden tasks
INPUT, WORKING, SCRATCH = Path("/kaggle/input"), Path("/kaggle/working"), Path("/kaggle/temp")

names = [*RELEASE["datasets"], RELEASE["competition"]]
found = {name: [path for path in sorted(INPUT.rglob(name)) if path.is_dir()] for name in names}
if missing := [name for name in names if not found[name]]:
    tree = "\n".join(str(path) for path in sorted(INPUT.rglob("*"))[:200])
    raise RuntimeError(f"not mounted: {', '.join(missing)}; there is\n{tree}")
folders = {name: paths[0] for name, paths in found.items()}
challenges = folders[RELEASE["competition"]] / "arc-agi_test_challenges.json"
blank = {"attempt_1": [[0, 0], [0, 0]], "attempt_2": [[0, 0], [0, 0]]}
tasks = json.loads(challenges.read_text())
(WORKING / "submission.json").write_text(json.dumps({i: [blank] * len(task["test"]) for i, task in tasks.items()}))

text = (folders[RELEASE["datasets"][0]] / "manifest.json").read_bytes()
if hashlib.sha256(text).hexdigest() != RELEASE["content"]:
    raise RuntimeError("manifest.json is of another build: push the datasets and the notebook once more")
manifest = json.loads(text)
for name, digest in manifest["files"].items():
    folder, file = name.split("/")
    if hashlib.sha256((folders[folder] / file).read_bytes()).hexdigest() != digest:
        raise RuntimeError(f"{name} is not what was built: push the datasets and the notebook once more")
print(f"content {RELEASE['content'][:12]}, commit {manifest['commit']}, {len(tasks)} tasks, rerun: {RERUN}")
print(f"{len(manifest['files'])} files verified after {time.monotonic() - BEGAN:.0f} s")

# %%
# Only what the image lacks, in exactly these versions; nothing that it has is touched, save what is in the list.
wheels = folders[RELEASE["datasets"][0]]
pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--require-hashes", "--quiet"]
subprocess.run([*pip, "--find-links", str(wheels), "-r", str(wheels / "requirements.lock")], check=True)
print(f"installed after {time.monotonic() - BEGAN:.0f} s")

# %%
# Kaggle silently gives other machines than were asked for.
look = """
import importlib.metadata, importlib.util, json, sys, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
for i in range(len(gpus)):
    torch.ones(8, 8, device=f"cuda:{i}").sum().item()
libraries = [name for name in ("torch", "transformers", "vllm", "ray", "arc_solver") if importlib.util.find_spec(name)]
print("Python", sys.version.split()[0], {name: importlib.metadata.version(name) for name in libraries}, file=sys.stderr)
print(json.dumps([gpus, torch.__version__]))
"""
looked = subprocess.run([sys.executable, "-c", look], check=True, stdout=subprocess.PIPE, text=True)
gpus, version = json.loads(looked.stdout)
if not version.startswith(manifest["torch"]):
    raise RuntimeError(f"the image has PyTorch {version}, and vLLM needs {manifest['torch']}: pin it with kaggle.image")
wanted = json.loads(os.environ.get("ARC_SOLVER_GPUS", json.dumps(manifest["gpus"])))  # set by rehearsals only
print(f"GPUs: {gpus}")
if len(gpus) != len(wanted) or not all(part in name for part, name in zip(wanted, gpus, strict=True)):
    raise RuntimeError(f"this machine has the GPUs {gpus}, not {wanted}: push once more, or change kaggle.machine")

# %%
# Another try goes on where the one before was ended: by a lack of memory, say.
clock = float(os.environ.get("ARC_SOLVER_CLOCK", 1))  # set by rehearsals only: their hours are shorter
budget = clock * (manifest["time_budget_s"] if RERUN else manifest["smoke_budget_s"])
words = [str(wheels / "config.json"), "--tasks", str(challenges), "--out", str(SCRATCH / "run")]
words += ["--submission", str(WORKING / "submission.json"), "run.show=0"]
words += [f"model.path={folders[manifest['weights']]}"] if manifest["weights"] else []
words += [f"model.adapter={folders[manifest['adapter']]}"] if manifest["adapter"] else []
words += [] if RERUN else ["--smoke", str(manifest["smoke_tasks"])]
SCRATCH.mkdir(parents=True, exist_ok=True)
for attempt in range(3):
    left = max(30, int(budget - (time.monotonic() - BEGAN)))
    print(f"attempt {attempt + 1}, {left} s left", flush=True)
    solving = subprocess.run([sys.executable, "-P", "-m", "arc_solver.solve", *words, "--time-budget", f"{left}s"])
    if solving.returncode in (0, 2, 3) or left == 30:  # done; refused; all that there was time for
        break
print(f"solved after {time.monotonic() - BEGAN:.0f} s, exit code {solving.returncode}")

# %%
# In the run that is scored, whatever there is counts. Anywhere else a failure must be seen.
score = [sys.executable, "-P", "-m", "arc_solver.score", "--validate", str(WORKING / "submission.json")]
subprocess.run([*score, "--tasks", str(challenges)], check=True)
summary = SCRATCH / "run" / "summary.json"
answered = json.loads(summary.read_text())["answered"] if summary.exists() else 0
print(f"{answered} of {len(tasks)} tasks answered")
if not answered or (solving.returncode not in (0, 3) and not (RERUN and clock == 1)):
    raise RuntimeError(f"bin/solve ended with exit code {solving.returncode}, {answered} tasks answered: see above")
