// What KEDA is installed with: files are taken from it, nothing is compiled.
module gantline.io/devcluster/keda

go 1.26.0

require github.com/kedacore/keda/v2 v2.21.0
