// Definitions of the Gateway API's kinds: files are taken from it, nothing is compiled.
module gantline.io/devcluster/gateway-api

go 1.26.0

require sigs.k8s.io/gateway-api v1.6.3
