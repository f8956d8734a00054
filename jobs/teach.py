"""The teachers alone as a Ray job: pivot and sources read the corpus, their top-k logprobs are stored in their own vocabularies.

Inputs:  a config and overrides; `--only NAME` (repeatable) for some of the models; the corpus.
Outputs: <storage>/artifacts/teach/<key>/shard-*.parquet, one artefact a model.
GPUs:    `resources.teach`: gpus of one engine times max_workers, for one model at a time or several (`resources.branches`).

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/teach.py jobs/configs/demo.yaml

Safe to repeat: sealed artefacts are not made again, so a job that was cut off is submitted again as it stands. On a cluster of several machines
`run.storage` must be a URL or a folder that all of them share.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["teach", *sys.argv[1:]]))
