{{/* The operator's settings, variable by variable as gantline_operator/settings.py names them. */}}
{{- define "gantline.settings" -}}
- {name: HOME, value: /tmp}
- {name: GANTLINE_WATCH_NAMESPACES, value: {{ include "gantline.namespaces" . | fromJsonArray | join "," | quote }}}
- {name: GANTLINE_OBSERVE_NODES, value: {{ ternary "auto" "never" (or (eq .Values.rbac.scope "cluster") .Values.rbac.readNodes) }}}
{{- range $device, $image := .Values.runtime.images }}
- {name: GANTLINE_IMAGE_{{ upper $device }}, value: {{ $image | quote }}}
{{- end }}
- {name: GANTLINE_IMAGE_PULL_POLICY, value: {{ .Values.runtime.imagePullPolicy }}}
- {name: GANTLINE_IMAGE_PULL_SECRETS, value: {{ .Values.runtime.imagePullSecrets | join "," | quote }}}
- {name: GANTLINE_POD_USER, value: {{ ternary "cluster" (.Values.podUser | int | toString) (eq (toString .Values.podUser) "cluster") | quote }}}
- {name: GANTLINE_HF_ENDPOINT, value: {{ .Values.runtime.hfEndpoint | quote }}}
- {name: GANTLINE_S3_ENDPOINT, value: {{ .Values.runtime.s3Endpoint | quote }}}
- {name: GANTLINE_INSECURE_REGISTRIES, value: {{ .Values.runtime.insecureRegistries | join "," | quote }}}
- {name: GANTLINE_NETWORK_POLICIES, value: {{ .Values.runtime.networkPolicy.enabled | quote }}}
- {name: GANTLINE_SERVER_CLIENTS, value: {{ include "gantline.serverClients" . | quote }}}
- {name: GANTLINE_INFERENCE_POOLS, value: {{ .Values.runtime.inferencePools | quote }}}
- {name: GANTLINE_INVENTORY_CONFIGMAP, value: {{ with include "gantline.inventory" . }}{{ printf "%s/%s" $.Release.Namespace . | quote }}{{ else }}""{{ end }}}
- {name: GANTLINE_DEMAND_NAMESPACE, value: {{ .Release.Namespace }}}
- {name: GANTLINE_SCALING_INTERVAL_SECONDS, value: {{ .Values.operator.scalingIntervalSeconds | int | quote }}}
- {name: GANTLINE_LOAD_URL, value: {{ if .Values.metrics.service }}{{ printf "http://%s-metrics.%s.svc:8080" (include "gantline.fullname" .) .Release.Namespace | quote }}{{ else }}""{{ end }}}
- {name: GANTLINE_CUSTOM_METRICS_PORT, value: {{ ternary "8443" "0" .Values.customMetrics.enabled | quote }}}
{{- if and .Values.customMetrics.enabled (not .Values.customMetrics.certificate.secretName) }}
{{- $name := printf "%s-custom-metrics" (include "gantline.fullname" .) }}
- {name: GANTLINE_CUSTOM_METRICS_HOSTS, value: "{{ $name }}.{{ .Release.Namespace }}.svc"}
- {name: GANTLINE_CUSTOM_METRICS_SECRET, value: "{{ .Release.Namespace }}/{{ $name }}"}
{{- end }}
- {name: GANTLINE_LEASE, value: "{{ .Release.Namespace }}/{{ include "gantline.fullname" . }}"}
- {name: GANTLINE_IDENTITY, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: GANTLINE_ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- if .Values.webhook.enabled }}
{{- $name := include "gantline.fullname" . }}
- {name: GANTLINE_WEBHOOK_PORT, value: "9443"}
- {name: GANTLINE_WEBHOOK_HOSTS, value: "{{ $name }}-webhook.{{ .Release.Namespace }}.svc"}
- {name: GANTLINE_WEBHOOK_SECRET, value: "{{ .Release.Namespace }}/{{ $name }}-webhook"}
- {name: GANTLINE_WEBHOOK_CONFIGURATION, value: {{ $name }}-{{ .Release.Namespace }}}
{{- end }}
- {name: GANTLINE_CALIBRATION_CONFIGMAP, value: {{ printf "%s/%s-calibration" .Release.Namespace (include "gantline.fullname" .) | quote }}}
- {name: GANTLINE_METRICS_PORT, value: "8080"}
- {name: GANTLINE_HEALTH_PORT, value: "8081"}
- {name: GANTLINE_WORKERS, value: {{ .Values.operator.workers | int | quote }}}
- {name: GANTLINE_RESYNC_SECONDS, value: {{ .Values.operator.resyncSeconds | int | quote }}}
- {name: GANTLINE_JOB_RETENTION_SECONDS, value: {{ .Values.operator.jobRetentionSeconds | int | quote }}}
- {name: GANTLINE_LOG_LEVEL, value: {{ .Values.operator.logLevel }}}
{{- end -}}
