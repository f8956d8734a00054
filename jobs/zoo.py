"""Remake the zoo: tokenizers, weights and data files of `fusion_ray/zoo`, and the table of its README.

    python jobs/zoo.py                      everything (about 15 minutes on one core)
    python jobs/zoo.py --data               the data files alone (a second)
    python jobs/zoo.py --check              recompute the data files and compare; exit code 1 where one differs
    python jobs/zoo.py --only source_neox   one model (may be repeated)
    python jobs/zoo.py --score              measure the shipped models on the held-out items, train nothing

Inputs: none but the seeds in the code. Outputs: `fusion_ray/zoo/models/<name>/`, `fusion_ray/zoo/data/*.jsonl`,
`fusion_ray/zoo/models/scores.json`. Needs no GPU and no Ray; weights are the same from the same versions, machine and thread count.
On a cluster: ray job submit --working-dir . -- python jobs/zoo.py
"""

import argparse
import logging
import sys

from fusion_ray.zoo import catalogue, dataset

logger = logging.getLogger("zoo")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data", action="store_true", help="write the data files and stop")
    what.add_argument("--check", action="store_true", help="compare the data files with what the seeds give and stop")
    what.add_argument("--score", action="store_true", help="measure the shipped models and stop")
    parser.add_argument("--only", action="append", choices=sorted(catalogue.ZOO_MODELS), help="make this model alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of one training (default 1)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.check:
        stale = dataset.stale()
        for path in stale:
            logger.error("%s is missing or differs from what the seeds give; python jobs/zoo.py --data writes it", path)
        return 1 if stale else 0
    if not arguments.score:
        dataset.write()
    if arguments.data:
        return 0

    from fusion_ray.zoo import make  # torch only where a model is made or measured

    names = arguments.only or list(catalogue.ZOO_MODELS)
    for name in names:
        make.model(catalogue.ZOO_MODELS[name], threads=arguments.threads, train=not arguments.score)
    return 0


if __name__ == "__main__":
    sys.exit(main())
