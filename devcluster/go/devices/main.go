// A device plugin for devices that do not exist: the kubelet counts, allocates and names them as it does a vendor's, and nothing is behind them.
//
//	devices FOLDER RESOURCE COUNT    FOLDER is the kubelet's device-plugins, RESOURCE for instance nvidia.com/gpu
//
// A container finds those that it was given in GANTLINE_DEVICES. The plugin ends when the kubelet does: whoever keeps it starts it again.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	plugin "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const watch = time.Second

type devices struct {
	plugin.UnimplementedDevicePluginServer
	names []string
}

func (d *devices) GetDevicePluginOptions(context.Context, *plugin.Empty) (*plugin.DevicePluginOptions, error) {
	return &plugin.DevicePluginOptions{}, nil
}

// ListAndWatch tells of all devices once, healthy for as long as the plugin lives.
func (d *devices) ListAndWatch(_ *plugin.Empty, stream grpc.ServerStreamingServer[plugin.ListAndWatchResponse]) error {
	list := make([]*plugin.Device, 0, len(d.names))
	for _, name := range d.names {
		list = append(list, &plugin.Device{ID: name, Health: plugin.Healthy})
	}
	if err := stream.Send(&plugin.ListAndWatchResponse{Devices: list}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (d *devices) Allocate(_ context.Context, request *plugin.AllocateRequest) (*plugin.AllocateResponse, error) {
	answer := &plugin.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		given := strings.Join(container.DevicesIds, ",")
		answer.ContainerResponses = append(answer.ContainerResponses,
			&plugin.ContainerAllocateResponse{Envs: map[string]string{"GANTLINE_DEVICES": given}})
	}
	return answer, nil
}

func run(folder, resource string, count int) error {
	socket := strings.ReplaceAll(resource, "/", "_") + ".sock"
	path, kubelet := filepath.Join(folder, socket), filepath.Join(folder, "kubelet.sock")
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	served := &devices{}
	for number := range count {
		served.names = append(served.names, fmt.Sprintf("%s-%d", filepath.Base(resource), number))
	}
	server := grpc.NewServer()
	plugin.RegisterDevicePluginServer(server, served)
	go func() { log.Fatal(server.Serve(listener)) }()

	before, err := os.Stat(kubelet)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient("unix://"+kubelet, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = plugin.NewRegistrationClient(connection).Register(context.Background(),
		&plugin.RegisterRequest{Version: plugin.Version, Endpoint: socket, ResourceName: resource})
	if err != nil {
		return err
	}
	for { // a kubelet that starts anew makes its socket anew and has forgotten its plugins
		time.Sleep(watch)
		if now, err := os.Stat(kubelet); err != nil || !os.SameFile(before, now) {
			return fmt.Errorf("the kubelet's socket is another: %v", err)
		}
	}
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: devices FOLDER RESOURCE COUNT")
	}
	count, err := strconv.Atoi(os.Args[3])
	if err != nil || count < 0 {
		log.Fatalf("%q is no number of devices", os.Args[3])
	}
	log.Fatal(run(os.Args[1], os.Args[2], count))
}
