{{/* Name of the release's objects: `gantline` for a release of that name, else RELEASE-gantline. */}}
{{- define "gantline.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 40 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end -}}

{{- define "gantline.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "gantline.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed where serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "gantline.image" -}}
{{- $repository := required "image.repository is needed: build the Dockerfile's target `operator`, push it where your nodes can pull, and name it here" .Values.image.repository -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* Namespaces with services, as a JSON list; empty where the operator serves the whole cluster. */}}
{{- define "gantline.namespaces" -}}
{{- if eq .Values.rbac.scope "namespace" -}}
{{- default (list .Release.Namespace) .Values.watchNamespaces | uniq | toJson -}}
{{- else -}}
[]
{{- end -}}
{{- end -}}

{{- define "gantline.testNamespace" -}}
{{- $namespaces := include "gantline.namespaces" . | fromJsonArray -}}
{{- if .Values.test.namespace -}}
{{- .Values.test.namespace -}}
{{- else if $namespaces -}}
{{- first $namespaces -}}
{{- else -}}
{{- .Release.Namespace -}}
{{- end -}}
{{- end -}}

{{- define "gantline.inventory" -}}
{{- if .Values.inventory.configMap -}}
{{- .Values.inventory.configMap -}}
{{- else if .Values.inventory.pools -}}
{{- printf "%s-inventory" (include "gantline.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change, for selectors. */}}
{{- define "gantline.selector" -}}
app.kubernetes.io/name: gantline-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gantline.labels" -}}
{{ include "gantline.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: gantline
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "gantline.podSecurity" -}}
runAsNonRoot: true
{{- if ne (toString .Values.podUser) "cluster" }}
runAsUser: {{ .Values.podUser | int }}
runAsGroup: {{ .Values.podUser | int }}
fsGroup: {{ .Values.podUser | int }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "gantline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where the operator's own pods may run, and how their images are pulled; nothing where nothing is set. */}}
{{- define "gantline.placement" -}}
{{- $fields := dict -}}
{{- range .Values.imagePullSecrets -}}
{{- $_ := set $fields "imagePullSecrets" (append (default list $fields.imagePullSecrets) (dict "name" .)) -}}
{{- end -}}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "priorityClassName" -}}
{{- with index $.Values $name -}}
{{- $_ := set $fields $name . -}}
{{- end -}}
{{- end -}}
{{- with $fields -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* Annotations of the hook that applies the CRD; the argument is its weight. */}}
{{- define "gantline.crdHook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{/* Annotations of the objects of `helm test`; the argument is their weight. */}}
{{- define "gantline.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
