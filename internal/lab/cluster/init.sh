# The first process of a node: makes the node's view of the machine, says that it is
# ready, and collects the processes that others leave behind.
#
#   init.sh STATE NODE CGROUP ADDRESS [inside]
set -euo pipefail
state=$1 node=$2 cgroup=$3 address=$4
own=$state/$node

if [[ ${5:-} != inside ]]; then
	mount --make-rprivate /
	for root in /sys/fs/cgroup/*/; do
		for dir in "${root}${cgroup%/*}" "${root}$cgroup"; do
			mkdir -p "$dir"
			for file in cpuset.cpus cpuset.mems; do
				if [[ -e $root$file ]]; then cat "$root$file" >"$dir/$file"; fi
			done
		done
		echo 0 >"${root}$cgroup/cgroup.procs"
	done
	# The control groups that the node sees begin here.
	exec unshare --cgroup bash "$0" "$@" inside
fi

mount -t proc proc /proc
# Other networks' names must not live on in here.
umount -R -l /run/netns 2>/dev/null || true

# The network's view of /sys, and the node's part of the control groups.
groups=$(grep -E ' cgroup2? ' /proc/self/mounts)
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
while read -r _ dir type options _; do
	mkdir "$dir"
	options=$(tr , '\n' <<<"$options" | grep -vE '^(rw|ro|relatime|nosuid|nodev|noexec)$' | paste -sd, || true)
	mount -t "$type" ${options:+-o "$options"} cgroup "$dir"
done <<<"$groups"

# Its own /etc, /opt, /var and /run; the rest of the file system is the machine's.
mkdir -p "$own"/{etc,etc.work,var/lib,var/log,var/cache,run/"${state##*/}"}
mkdir -p -m 1777 "$own/var/tmp"
# Who installs a CNI plug-in on the node must not install it on the machine.
mkdir -p "$own/opt/cni/bin"
ln -sf /usr/lib/cni/* "$own/opt/cni/bin/"
ln -sfn /run "$own/var/run"
mount -t overlay -o "lowerdir=/etc,upperdir=$own/etc,workdir=$own/etc.work" overlay /etc
rm -f /etc/resolv.conf
: >/etc/resolv.conf
echo "$node" >/etc/hostname
printf '127.0.0.1 localhost\n::1 localhost\n%s %s\n' "$address" "$node" >/etc/hosts
mount --bind "$own/var" /var
mount --bind "$own/opt" /opt
mount --bind "$state" "$own/run/${state##*/}"
mount --rbind "$own/run" /run
mount --make-rshared /
hostname "$node"
trap : TERM INT HUP
touch "$own/up"
while :; do
	sleep 86400 &
	wait $! || true
done
