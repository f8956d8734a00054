"""Alignment alone as a Ray job: every source's logprobs in the pivot's tokens and vocabulary (makes missing teach artefacts first).

Inputs:  a config and overrides; `--only NAME` (repeatable) for some of the sources.
Outputs: <storage>/artifacts/align/<key>/shard-*.parquet with the coverage report in the manifest.
GPUs:    none once the teach artefacts are there; `resources.align` CPUs.

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/align.py jobs/configs/demo.yaml

Safe to repeat: sealed artefacts are not made again, so a job that was cut off is submitted again as it stands. On a cluster of several machines
`run.storage` must be a URL or a folder that all of them share.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["align", *sys.argv[1:]]))
