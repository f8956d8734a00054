"""The endpoint as a Ray job: a run's fused model, or any model folder, behind an OpenAI-compatible API until the job is stopped.

Inputs:  a config (serves the model of its first merge method) or a model folder, and overrides; the clients' key in the environment
         variable that `serve.api_key_env` names (FUSION_RAY_API_KEY), without which `--insecure` must be given.
Outputs: http://<serve.host>:<serve.port>/v1; nothing on disk.
GPUs:    `resources.serve`: gpus of one engine times serve.max_replicas.

    export RAY_AUTH_MODE=token                      # and RAY_AUTH_TOKEN or ~/.ray/auth_token, as on the cluster
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/serve.py jobs/configs/demo.yaml serve.host=0.0.0.0

Stop it with `ray job stop`. For an endpoint that outlives a job and upgrades in place, use cluster/kuberay/rayservice-endpoint.yaml.
"""

import sys

from fusion_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
