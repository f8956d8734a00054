"""Targets alone as a Ray job: the pivot fine-tuned to each source with DeepSpeed (makes what is missing before it).

Inputs:  a config and overrides; `--only NAME` (repeatable) for some of the branches.
Outputs: <storage>/artifacts/distill/<key>/: a Hugging Face model folder, metrics.jsonl and training.json for each target.
GPUs:    `resources.distill`: one worker a GPU, for each of `resources.branches` side by side.

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/distill.py jobs/configs/demo.yaml

Safe to repeat: sealed artefacts are not made again, so a job that was cut off is submitted again as it stands. On a cluster of several machines
`run.storage` must be a URL or a folder that all of them share.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["distill", *sys.argv[1:]]))
