"""Evaluation alone as a Ray job: every model of the run answers the questions and reads the held-out text (makes what is missing before it).

Inputs:  a config and overrides; `--only NAME` (repeatable) for some of the models; a judge's key in the environment where `evaluate.judge` is set.
Outputs: <storage>/artifacts/evaluate/<key>/: answers, scores and bits per byte of each model.
GPUs:    `resources.evaluate` for the models in batch and `resources.serve` for the fused ones.

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/evaluate.py jobs/configs/demo.yaml

Safe to repeat: sealed artefacts are not made again, so a job that was cut off is submitted again as it stands. On a cluster of several machines
`run.storage` must be a URL or a folder that all of them share.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
