{{/* Values that are younger than the chart's first version, by their paths, with their defaults. `helm upgrade --reuse-values` brings the values
of the installed chart instead of this one's, so any of these may be missing. Tests hold the list complete and equal to values.yaml. */}}
{{- define "gantline.laterValues" -}}
replicaCount: 1
podUser: 1000
runtime.networkPolicy.enabled: false
runtime.networkPolicy.clients: everyone
runtime.networkPolicy.alsoFrom: []
runtime.networkPolicy.apiServerPorts: [443, 6443]
runtime.inferencePools: auto
runtime.s3Endpoint: ""
runtime.insecureRegistries: []
operator.scalingIntervalSeconds: 5
webhook.enabled: false
webhook.timeoutSeconds: 5
metrics.prometheusOperator: auto
metrics.labels: {}
customMetrics.enabled: false
customMetrics.certificate.secretName: ""
customMetrics.certificate.caBundle: ""
gateway.enabled: true
gateway.replicas: 2
gateway.apiKeys.enabled: false
gateway.tls.secretName: ""
gateway.corsOrigins: []
gateway.clients.headSeconds: 30
gateway.clients.bodySeconds: 60
gateway.clients.stallSeconds: 30
gateway.drainSeconds: 120
gateway.logLevel: info
gateway.service.type: ClusterIP
gateway.service.port: auto
gateway.service.annotations: {}
gateway.ingress.host: ""
gateway.ingress.className: ""
gateway.ingress.tlsSecret: ""
gateway.ingress.annotations: {}
gateway.httpRoute.enabled: auto
gateway.httpRoute.parentRefs: []
gateway.httpRoute.hostnames: []
gateway.resources: {requests: {cpu: 100m, memory: 128Mi}, limits: {memory: 512Mi}}
dashboard.enabled: false
dashboard.labels: {grafana_dashboard: "1"}
dashboard.annotations: {}
{{- end -}}

{{/* Puts those that are missing among the values. Every template begins with it, since Helm promises no order of templates. */}}
{{- define "gantline.completeValues" -}}
{{- range $path, $default := include "gantline.laterValues" . | fromYaml -}}
{{- $place := $.Values -}}
{{- $names := splitList "." $path -}}
{{- range initial $names -}}
{{- if not (kindIs "map" (get $place .)) -}}
{{- $_ := set $place . dict -}}
{{- end -}}
{{- $place = get $place . -}}
{{- end -}}
{{- if not (hasKey $place (last $names)) -}}
{{- $_ := set $place (last $names) $default -}}
{{- end -}}
{{- end -}}
{{- end -}}
