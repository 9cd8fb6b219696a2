#!/usr/bin/env bash
# Makes the container image without a registry or a builder: .cache/image/culvert.tar (an
# OCI layout that is also a docker-archive) with its list of parts beside it, sbom.spdx.json.
# The layer with Debian's packages is made once per package list; UPDATE=1 makes it again,
# from what Debian has today. TAG names the image. Needs root, or user namespaces.
#
# hack/image.sh --check makes it once more, from a copy of this tree in another directory, and
# fails when that is another image; with UPDATE=1 Debian's layer is made once more, too.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/cache.sh

# check makes the image in another place and compares.
check() {
	local other
	other=$(mktemp -d)
	trap 'rm -rf "$other"' RETURN
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --no-dereference --target-directory "$other" 2>/dev/null || true # what is deleted
	mkdir "$other/.cache"
	cp -a "$(cache_root)/debian" "$other/.cache/" # where UPDATE=1 touches nobody else's
	CULVERT_CACHE=$other/.cache VERSION=$(version) REVISION=$(revision) CREATED=$(created) "$other/hack/image.sh" >/dev/null
	local file
	for file in culvert.tar sbom.spdx.json; do
		cmp ".cache/image/$file" "$other/.cache/image/$file" || { echo "image: made twice, $file differs: something of the machine, the directory or the time is in it" >&2; return 1; }
	done
	echo "image: made twice, in two directories: the same"
}
version() { echo "${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo unknown)}"; }
revision() { echo "${REVISION:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"; }
created() { echo "${CREATED:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}"; }
if [[ "${1:-}" == --check ]]; then
	check
	exit
fi

tag=${TAG:-culvert.dev/culvert:dev}
out=.cache/image
suite=bookworm
mkdir -p "$out"
exec 9>"$out/lock"
flock 9 # one at a time

# Parts of Debian that nothing at run time uses.
purged=(perl perl-base perl-modules-5.36 libperl5.36 libgdbm6 libgdbm-compat4 debconf libdebconfclient0
	udev tpm-udev login passwd mount util-linux util-linux-extra bsdutils diffutils adduser e2fsprogs sysvinit-utils ncurses-bin)

debian() {
	command -v mmdebstrap >/dev/null || { echo "image: mmdebstrap is missing: run 'make setup'" >&2; return 1; }
	echo "image: the layer of Debian's packages (once; under a minute)"
	local include raw=$1/raw
	include=$(grep -v '^#' images/packages | xargs | tr ' ' ,)
	mkdir "$raw"
	# shellcheck disable=SC2016 # $1 is the hook's
	SOURCE_DATE_EPOCH=1686355200 mmdebstrap --variant=essential --include="$include" \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--customize-hook='dpkg --root="$1" --force-all --purge '"${purged[*]}" \
		$suite "$raw/root.tar" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$raw/log" 2>&1 || { cat "$raw/log" >&2; return 1; }
	go run ./hack/image layer --root "$raw/root.tar" --out "$1/layer.tar"
	rm -rf "$raw"
}

# The layer depends on the list, on how it is made and on what the packer leaves out.
key=$({ cat images/packages hack/image/debian.go; declare -f debian; echo "${purged[@]}" $suite; go env GOARCH; } | sha256sum | cut -c1-16)
if [[ -n "${UPDATE:-}" ]]; then
	rm -f "$(cache_root)/debian/$key/complete"
fi
layer=$(cached debian "$key" debian)/layer.tar
if [[ -n "$(find "$layer" -mtime +7)" ]]; then
	echo "image: Debian's packages are those of $(date -r "$layer" +%F): 'make image UPDATE=1' takes today's" >&2
fi

version=$(version)
rm -rf "$out/bin"
mkdir -p "$out/bin"
CGO_ENABLED=0 go build -trimpath -buildvcs=false \
	-ldflags "-s -w -X github.com/culvert-vpn/culvert/internal/process.version=$version" -o "$out/bin/" ./cmd/...
go run ./hack/image pack --debian "$layer" --programs "$out/bin" --license LICENSE \
	--name "$tag" --version "$version" \
	--revision "$(revision)" \
	--created "$(created)" \
	--out "$out/culvert.tar" --sbom "$out/sbom.spdx.json"
