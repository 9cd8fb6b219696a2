#!/usr/bin/env bash
# Prints the directory of Debian 12's stock kernel (boot/vmlinuz-*, lib/modules/*), and
# fetches and unpacks its package when it is not there. Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p .cache/kernel
cd .cache/kernel
exec 9>lock
flock 9

# The newest release, as the package lists name it; without lists, what is there already.
resolve() { apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-6\.1\..*\)/\1/p'; }
package=$(resolve)
if [[ -z "$package" ]]; then
	package=$(find . -maxdepth 2 -name complete -printf '%h\n' | sort -V | tail -n 1)
	package=${package#./}
fi
if [[ -z "$package" ]]; then
	apt-get -q update </dev/null >&2
	package=$(resolve)
fi
if [[ -z "$package" ]]; then
	echo "kernel: the package lists know no linux-image-amd64 of Debian 12" >&2
	exit 1
fi

if [[ ! -e $package/complete ]]; then
	rm -rf "$package" ./*.deb
	apt-get -q download "$package" >&2 || { apt-get -q update </dev/null >&2 && apt-get -q download "$package" >&2; }
	dpkg -x "$package"_*.deb "$package"
	rm -f ./*.deb
	depmod -b "$package" "${package#linux-image-}"
	touch "$package/complete"
fi
echo "$PWD/$package"
