"""A reduced schema of KubeRay's v1 resources (the v1.7 line) and of the core objects beside them: the fields that files here may use, nothing else.

Written from the API reference, not copied from the CRDs (they are megabytes): a field that is missing here but right there is added when it is used.
An unknown field is refused, as the API server with strict validation would.
"""

Schema = dict[str, object]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
QUANTITY: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"},
    ]
}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
DNS_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object with these fields and no other."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def many(item: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": item, **bounds}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


METADATA = record(
    ("name",),
    name={"type": "string", "pattern": DNS_LABEL, "maxLength": 63},
    namespace=STRING,
    labels=STRINGS,
    annotations=STRINGS,
)
RESOURCES = record(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
KEY_REFERENCE = record(("name", "key"), name=STRING, key=STRING, optional=BOOLEAN)
ENV = record(
    ("name",),
    name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    value=STRING,
    valueFrom=record(secretKeyRef=KEY_REFERENCE, configMapKeyRef=KEY_REFERENCE),
)
ENV_FROM = record(secretRef=record(("name",), name=STRING), configMapRef=record(("name",), name=STRING), prefix=STRING)
MOUNT = record(("name", "mountPath"), name=STRING, mountPath=STRING, readOnly=BOOLEAN, subPath=STRING)
SECURITY = record(
    runAsUser=COUNT,
    runAsGroup=COUNT,
    runAsNonRoot=BOOLEAN,
    allowPrivilegeEscalation=BOOLEAN,
    readOnlyRootFilesystem=BOOLEAN,
    privileged=BOOLEAN,
)
CONTAINER = record(
    ("name", "image"),
    name={"type": "string", "pattern": DNS_LABEL},
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=many(STRING),
    args=many(STRING),
    ports=many(
        record(
            ("containerPort",),
            name={"type": "string", "pattern": DNS_LABEL, "maxLength": 15},
            containerPort=PORT,
            protocol=one_of("TCP", "UDP"),
        )
    ),
    env=many(ENV),
    envFrom=many(ENV_FROM),
    resources=RESOURCES,
    volumeMounts=many(MOUNT),
    securityContext=SECURITY,
)
VOLUME = record(
    ("name",),
    name={"type": "string", "pattern": DNS_LABEL},
    persistentVolumeClaim=record(("claimName",), claimName=STRING, readOnly=BOOLEAN),
    emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    secret=record(("secretName",), secretName=STRING, optional=BOOLEAN),
    configMap=record(("name",), name=STRING, optional=BOOLEAN),
)
TOLERATION = record(
    key=STRING,
    operator=one_of("Exists", "Equal"),
    value=STRING,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=COUNT,
)
POD = record(
    ("containers",),
    containers=many(CONTAINER, minItems=1),
    volumes=many(VOLUME),
    tolerations=many(TOLERATION),
    nodeSelector=STRINGS,
    serviceAccountName=STRING,
    imagePullSecrets=many(record(("name",), name=STRING)),
    priorityClassName=STRING,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    terminationGracePeriodSeconds=COUNT,
    securityContext=record(runAsUser=COUNT, runAsGroup=COUNT, runAsNonRoot=BOOLEAN, fsGroup=COUNT),
)
TEMPLATE = record(("spec",), metadata=record(labels=STRINGS, annotations=STRINGS), spec=POD)

AUTOSCALER = record(
    version=one_of("v1", "v2"),
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    resources=RESOURCES,
    env=many(ENV),
    envFrom=many(ENV_FROM),
    volumeMounts=many(MOUNT),
    securityContext=SECURITY,
)
HEAD = record(
    ("template",),
    template=TEMPLATE,
    rayStartParams=STRINGS,
    resources=STRINGS,
    labels=STRINGS,
    enableIngress=BOOLEAN,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)
WORKERS = record(
    ("groupName", "template"),
    groupName={"type": "string", "pattern": DNS_LABEL},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    idleTimeoutSeconds=COUNT,
    suspend=BOOLEAN,
    rayStartParams=STRINGS,
    resources=STRINGS,
    labels=STRINGS,
    template=TEMPLATE,
)
CLUSTER = record(
    ("headGroupSpec",),
    rayVersion=STRING,
    authOptions=record(mode=one_of("token", "disabled"), secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
    suspend=BOOLEAN,
    managedBy=STRING,
    headServiceAnnotations=STRINGS,
)
JOB = record(
    (),
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    metadata=STRINGS,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=record(backoffLimit=COUNT),
    submitterPodTemplate=TEMPLATE,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    preRunningDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    suspend=BOOLEAN,
    managedBy=STRING,
    clusterSelector=STRINGS,
    rayClusterSpec=CLUSTER,
)
SERVICE = record(
    ("serveConfigV2", "rayClusterConfig"),
    serveConfigV2=STRING,
    rayClusterConfig=CLUSTER,
    upgradeStrategy=record(type=one_of("NewCluster", "None", "NewClusterWithIncrementalUpgrade")),
    excludeHeadPodFromServeSvc=BOOLEAN,
    rayClusterDeletionDelaySeconds=COUNT,
    suspend=BOOLEAN,
)


def resource(api_version: str, kind: str, **fields: Schema) -> Schema:
    return record(
        ("apiVersion", "kind", "metadata", *fields),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=METADATA,
        **fields,
    )


KINDS: dict[str, Schema] = {
    "RayCluster": resource("ray.io/v1", "RayCluster", spec=CLUSTER),
    "RayJob": resource("ray.io/v1", "RayJob", spec=JOB),
    "RayService": resource("ray.io/v1", "RayService", spec=SERVICE),
    "PersistentVolumeClaim": resource(
        "v1",
        "PersistentVolumeClaim",
        spec=record(
            ("accessModes", "resources"),
            accessModes=many(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), minItems=1),
            storageClassName=STRING,
            volumeName=STRING,
            resources=RESOURCES,
        ),
    ),
    "Secret": resource("v1", "Secret", type=one_of("Opaque"), stringData=STRINGS),
}
