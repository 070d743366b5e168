"""One whole job, alone in its process: prints its seconds and peak memory as JSON.

python -m benchmarks.quality_job '{"model": DIR, "prune_method": "wanda", ...}'
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import wanda_fast

if __name__ == "__main__":
    keywords = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        report = wanda_fast.prune(**keywords, save_model=Path(folder) / "pruned")
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_bytes": report.peak_memory["host"]}))
