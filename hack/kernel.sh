#!/usr/bin/env bash
# Prints the directory of Debian 12's stock kernel (boot/vmlinuz-*, lib/modules/*), and
# fetches and unpacks its package when it is not there. Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")"
. ./cache.sh

# The newest release, as the package lists name it; without lists, what is there already.
resolve() { apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-6\.1\..*\)/\1/p'; }
package=$(resolve)
if [[ -z "$package" ]]; then
	package=$(find "$(cache_root)/kernel" -mindepth 2 -maxdepth 2 -name complete -printf '%h\n' 2>/dev/null | sort -V | tail -n 1)
	package=${package##*/}
fi
if [[ -z "$package" ]]; then
	apt-get -q update </dev/null >&2
	package=$(resolve)
fi
if [[ -z "$package" ]]; then
	echo "kernel: the package lists know no linux-image-amd64 of Debian 12" >&2
	exit 1
fi

fetch() {
	cd "$1"
	apt-get -q download "$package" || { apt-get -q update </dev/null && apt-get -q download "$package"; }
	dpkg -x "$package"_*.deb .
	rm -f ./*.deb
	depmod -b . "${package#linux-image-}"
}
cached kernel "$package" fetch
