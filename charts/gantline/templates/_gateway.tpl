{{/* The gateway's objects are called like the release's, with an ending. */}}
{{- define "gantline.gatewayName" -}}
{{- printf "%s-gateway" (include "gantline.fullname" .) -}}
{{- end -}}

{{/* Labels that never change, for selectors. */}}
{{- define "gantline.gatewaySelector" -}}
app.kubernetes.io/name: gantline-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gantline.gatewayLabels" -}}
{{ include "gantline.gatewaySelector" . }}
app.kubernetes.io/component: gateway
app.kubernetes.io/part-of: gantline
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* What the public port speaks, which is also its name: an endpoint of the Service is only who has a port of that name, so that while TLS
is turned on or off nobody is sent to a pod that still speaks the other. */}}
{{- define "gantline.gatewayScheme" -}}
{{- ternary "https" "http" (not (empty .Values.gateway.tls.secretName)) -}}
{{- end -}}

{{- define "gantline.gatewayPort" -}}
{{- $port := toString .Values.gateway.service.port -}}
{{- if eq $port "auto" -}}
{{- ternary 443 80 (eq (include "gantline.gatewayScheme" .) "https") -}}
{{- else -}}
{{- $port | int -}}
{{- end -}}
{{- end -}}

{{/* What the gateway reads in a namespace with services. It writes nothing. */}}
{{- define "gantline.gatewayRules" -}}
- apiGroups: [gantline.io]
  resources: [inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
{{- end -}}

{{/* "true" where an object of the Gateway API's kind is wanted: asked for, or `auto` and known to the cluster. */}}
{{- define "gantline.wantsRoute" -}}
{{- $wanted := toString .Values.gateway.httpRoute.enabled -}}
{{- if or (eq $wanted "true") (and (eq $wanted "auto") .Values.gateway.httpRoute.parentRefs (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1/HTTPRoute")) -}}
true
{{- end -}}
{{- end -}}

{{/* Who reaches servers where network policies hold: the gateway, the operator, `helm test` and the namespaces that are named; "" is everyone. */}}
{{- define "gantline.serverClients" -}}
{{- with .Values.runtime.networkPolicy -}}
{{- if eq .clients "gateway" -}}
{{- if not $.Values.gateway.enabled -}}
{{- fail "runtime.networkPolicy.clients: gateway needs gateway.enabled" -}}
{{- end -}}
{{- $peers := list -}}
{{- range list "gantline-gateway" "gantline-operator" "gantline-test" -}}
{{- $peers = append $peers (printf "%s/app.kubernetes.io/name=%s" $.Release.Namespace .) -}}
{{- end -}}
{{- concat $peers .alsoFrom | join "," -}}
{{- else if .alsoFrom -}}
{{- fail "runtime.networkPolicy.alsoFrom goes with clients: gateway; without it everyone reaches servers" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The gateway's settings, variable by variable as gantline_gateway/settings.py names them. */}}
{{- define "gantline.gatewaySettings" -}}
- {name: HOME, value: /tmp}
- {name: GANTLINE_GATEWAY_PORT, value: "8080"}
- {name: GANTLINE_GATEWAY_INTERNAL_PORT, value: "8081"}
- {name: GANTLINE_GATEWAY_WATCH_NAMESPACES, value: {{ include "gantline.namespaces" . | fromJsonArray | join "," | quote }}}
- {name: GANTLINE_GATEWAY_OWN_SERVICE, value: "{{ .Release.Namespace }}/{{ include "gantline.gatewayName" . }}"}
- {name: GANTLINE_GATEWAY_API_KEY_SECRETS, value: {{ ternary .Release.Namespace "" .Values.gateway.apiKeys.enabled | quote }}}
{{- if .Values.gateway.tls.secretName }}
- {name: GANTLINE_GATEWAY_TLS_CERT, value: /etc/gantline/tls/tls.crt}
- {name: GANTLINE_GATEWAY_TLS_KEY, value: /etc/gantline/tls/tls.key}
{{- end }}
- {name: GANTLINE_GATEWAY_CORS_ORIGINS, value: {{ .Values.gateway.corsOrigins | join "," | quote }}}
- {name: GANTLINE_GATEWAY_HEAD_TIMEOUT, value: {{ .Values.gateway.clients.headSeconds | int | quote }}}
- {name: GANTLINE_GATEWAY_BODY_TIMEOUT, value: {{ .Values.gateway.clients.bodySeconds | int | quote }}}
- {name: GANTLINE_GATEWAY_STALL_TIMEOUT, value: {{ .Values.gateway.clients.stallSeconds | int | quote }}}
- {name: GANTLINE_GATEWAY_DRAIN_TIMEOUT, value: {{ .Values.gateway.drainSeconds | int | quote }}}
- {name: GANTLINE_GATEWAY_LOG_LEVEL, value: {{ .Values.gateway.logLevel }}}
{{- end -}}
