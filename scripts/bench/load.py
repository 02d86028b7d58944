"""The load generator: plays one `Job` at a time against one port and reports what it cost and whether it was right.

It is a process of its own, so that its CPU is not the contestant's.

Run: `python load.py`; reads jobs as JSON lines from standard input, writes reports as JSON lines, ends with its input.
"""

import gc
import json
import sys
from dataclasses import asdict

import uvloop

import leaving
import reading
from answer import Plan
from jobs import Job, Manner, Report


async def play(job: Job) -> Report:
    """Do the job and report; faults are counted in the report, never raised."""
    match job.manner:
        case Manner.READ:
            return await reading.play(job)
        case Manner.HANG_UP:
            return await leaving.hang_up(job)
        case Manner.STOP_READING:
            return await leaving.stop_reading(job)


def main() -> None:
    # A collection while answers arrive would show as a late chunk; between two jobs it is harmless.
    gc.disable()
    for line in sys.stdin:
        fields = json.loads(line)
        plan = Plan(**fields.pop("plan"))
        report = uvloop.run(play(Job(plan=plan, **fields)))
        print(json.dumps(asdict(report)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
