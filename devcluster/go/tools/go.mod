// Two small programs of our own; nothing but the standard library.
module gantline.io/devcluster/tools

go 1.26.0
