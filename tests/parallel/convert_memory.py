"""Convert checkpoints one after the other, as `python convert_memory.py PORTION_BYTES CHECKPOINT OUT …`.

Prints after each the most memory this process has ever held, in bytes.
"""

import resource
import sys
from pathlib import Path

from xtuner.engine.convert import convert

portion, *paths = sys.argv[1:]
for checkpoint, out in zip(paths[::2], paths[1::2], strict=True):
    convert(Path(checkpoint), Path(out), "bfloat16", max_bytes=int(portion))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
