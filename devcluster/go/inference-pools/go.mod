// The definition of InferencePool: a file is taken from it, nothing is compiled.
module gantline.io/devcluster/inference-pools

go 1.26.0

require sigs.k8s.io/gateway-api-inference-extension v1.0.0
