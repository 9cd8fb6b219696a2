# Inside the virtual machine, on the host's root file system: mounts what a machine has,
# loads what the tests need, and defines job, which the lines after this use.
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=0666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
# Not /tmp: the checkout may lie below it, and would be hidden.
mkdir -p /run/lock /run/netns /run/tmp/home
ln -sfn /run /var/run 2>/dev/null || true
ln -sfn /proc/self/fd /dev/fd
ip link set lo up
# New namespaces take these from here: without a wait for duplicates, addresses are ready
# as soon as they are set, however slow the machine.
echo 1 >/proc/sys/net/core/devconf_inherit_init_net
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/dad_transmits
hostname culvert-kernel

modprobe -a tun veth bridge dummy vxlan vrf sch_netem sch_tbf \
	wireguard esp4 esp6 xfrm_user xfrm_interface xfrm6_tunnel af_key \
	nf_tables nft_nat nft_masq nft_redir nft_ct nft_tproxy nft_socket nft_numgen nft_fib_inet nft_reject_inet \
	nft_log nft_limit nft_quota nf_conntrack_netlink

stty -F /dev/ttyS1 raw -echo
exec 3</dev/ttyS1 </dev/null >/dev/ttyS1 2>&1

# job NAME DIRECTORY PROGRAM ARGUMENT…: waits for a line from outside, which says that the
# program is there, runs it and frames its output.
job() {
	name=$1 directory=$2
	shift 2
	read -r _ <&3
	printf '\036begin %s\n' "$name"
	code=0
	(cd "$directory" && exec "$@" 3<&-) || code=$?
	printf '\n\036end %s %d\n' "$name" "$code"
}
printf '\036up %s\n' "$(cut -d ' ' -f 1 /proc/uptime)"
