"""Writes down how the steps of `bench/on_gpu.sh check` went, and on which machine."""

import argparse
import json
from pathlib import Path

import torch
from device_timing import machine

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", required=True)
parser.add_argument("--json", type=Path, required=True)
parser.add_argument("steps", nargs="+", help="name=passed, name=failed or name=missing")
arguments = parser.parse_args()
steps = dict(step.split("=", 1) for step in arguments.steps)
everything = {"machine": machine(torch.device(arguments.device)), "steps": steps}
arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
print(json.dumps(steps))
