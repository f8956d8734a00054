"""The whole run as one Ray job: teach, align, distill, merge, serve, evaluate, report.

Inputs:  a config (jobs/configs/*.yaml) and `key.sub=value` overrides; the models, corpus and questions that it names.
Outputs: <storage>/artifacts/ and <storage>/runs/<run.name>/ with report.json and report.html; the table on standard output.
GPUs:    what `resources` asks for: teach and serve as many as one engine needs, times their workers; distill one a worker; none with demo.yaml.

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/fuse.py jobs/configs/demo.yaml

Safe to repeat: sealed artefacts are not made again, so a job that was cut off is submitted again as it stands. On a cluster of several machines
`run.storage` must be a URL or a folder that all of them share.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["run", *sys.argv[1:]]))
