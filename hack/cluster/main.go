// Cluster starts and removes the real Kubernetes cluster of internal/lab/cluster: what
// is behind "make cluster-up" and "make cluster-down".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
)

const usage = `usage: cluster up [-name NAME] [-nodes N] [-two-subnets] [-mtu BYTES] [-allow-spoofing] [-no-cni] [-no-kube-proxy]
                  [-cni Bridge|Cilium|None] [-cilium VALUE=…]…
       cluster down [-name NAME | -all]
       cluster load [-name NAME] IMAGE.tar…
       cluster images DIRECTORY IMAGE.tar…  # for clusters that start with CULVERT_IMAGES=DIRECTORY
       cluster cilium [-name NAME] VALUE=…  # new values for the chart of a cluster with -cni Cilium
       cluster list`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1) //nolint:gocritic // stop only gives the signals back
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	o := cluster.Options{Keep: true, Out: os.Stdout}
	var noCNI, all bool
	var cni string
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprintln(os.Stderr, usage) }
	flags.StringVar(&o.Name, "name", cluster.DefaultName, "")
	flags.IntVar(&o.Nodes, "nodes", 2, "")
	flags.BoolVar(&o.TwoSubnets, "two-subnets", false, "")
	flags.IntVar(&o.MTU, "mtu", 1500, "")
	flags.BoolVar(&o.AllowSpoofing, "allow-spoofing", false, "")
	flags.StringVar(&cni, "cni", string(cluster.Bridge), "")
	flags.Func("cilium", "", func(v string) error { o.CiliumValues = append(o.CiliumValues, v); return nil })
	flags.BoolVar(&noCNI, "no-cni", false, "")
	flags.BoolVar(&o.NoKubeProxy, "no-kube-proxy", false, "")
	flags.BoolVar(&o.Keep, "keep", true, "") // false: whoever comes next may remove it when this process is gone
	flags.BoolVar(&all, "all", false, "")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if o.CNI = cluster.CNI(cni); strings.EqualFold(cni, string(cluster.Cilium)) {
		o.CNI = cluster.Cilium
	}
	if noCNI {
		o.CNI = cluster.NoCNI
	}
	switch args[0] {
	case "up":
		return up(ctx, o)
	case "down":
		names := []string{o.Name}
		if all {
			names = cluster.List()
		}
		return down(names)
	case "load":
		c, err := cluster.Attach(ctx, o.Name)
		if err != nil {
			return err
		}
		for _, archive := range flags.Args() {
			if err := c.Load(ctx, archive); err != nil {
				return err
			}
		}
		return nil
	case "images":
		if flags.NArg() == 0 {
			return errors.New(usage)
		}
		return cluster.Prepare(ctx, flags.Arg(0), flags.Args()[1:]...)
	case "cilium":
		c, err := cluster.Attach(ctx, o.Name)
		if err != nil {
			return err
		}
		return c.SetCilium(ctx, flags.Args()...)
	case "list":
		fmt.Println(strings.Join(cluster.List(), "\n"))
		return nil
	}
	return errors.New(usage)
}

func up(ctx context.Context, o cluster.Options) error {
	c, err := cluster.Start(ctx, o)
	if err != nil {
		return err
	}
	fmt.Printf(`
    export KUBECONFIG=%s
    export PATH=%s:$PATH
    kubectl get nodes,pods -A

A node, from the inside: nsenter --target %d --all
The outside (198.18.0.0/15): ip netns exec %s …
Remove it: make cluster-down NAME=%s
`, c.Kubeconfig(), strings.TrimSuffix(c.Program("/"), "/"), c.Nodes[0].PID(), c.Outside.Namespace, c.Name)
	return nil
}

func down(names []string) error {
	var errs []error
	for _, name := range names {
		errs = append(errs, cluster.Remove(name))
	}
	return errors.Join(errs...)
}
