{{/* What the operator does in a namespace with services. Every verb is one that it uses: server-side apply is `patch` (and `create`). */}}
{{- define "gantline.namespacedRules" -}}
- apiGroups: [gantline.io]
  resources: [inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [gantline.io]
  resources: [inferenceservices/status]
  verbs: [patch]
# Replicas by load, where a service's spec has `scaling`.
- apiGroups: [gantline.io]
  resources: [inferenceservices/scale]
  verbs: [patch]
# Owner references that block the owner's deletion need this where the API server enforces it.
- apiGroups: [gantline.io]
  resources: [inferenceservices/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [serviceaccounts, services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [ingresses, networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# Of the Gateway API; no use where the cluster lacks the kind.
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, create, patch, delete]
# `patch` is for one annotation, by which the least loaded pods go first when there are to be fewer; `delete` for a pod whose GPU failed.
# Whoever may make Deployments may run and delete any pod already, so they add no power.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, patch, delete]
# Where scaling.controller names another controller than Gantline.
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, list, create, patch, delete]
- apiGroups: [keda.sh]
  resources: [scaledobjects]
  verbs: [get, list, create, patch, delete]
# `list` is for what their controller says of Jobs whose pods it cannot create.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [list, create]
{{- if .Values.rbac.readLogs }}
# The progress of a download or a quantization, for status.
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end }}
{{- end -}}
