"""Merging alone as a Ray job: all targets into one model for every method of the config (makes what is missing before it).

Inputs:  a config and overrides; `--only LABEL` (repeatable) for some of the methods.
Outputs: <storage>/artifacts/merge/<key>/: a Hugging Face model folder and merge_report.json for each method.
GPUs:    none; `resources.merge` CPUs and `merge.max_bytes_in_flight` of memory a worker.

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/merge_targets.py jobs/configs/demo.yaml

Safe to repeat: sealed artefacts are not made again, so a job that was cut off is submitted again as it stands. On a cluster of several machines
`run.storage` must be a URL or a folder that all of them share.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["merge-targets", *sys.argv[1:]]))
