#!/usr/bin/env bash
# Where builds are kept that do not depend on this checkout's code: Kubernetes, Cilium, helm, the
# tools, a kernel, Debian's packages. All checkouts of a user share them, as they share Go's
# own cache. To be sourced; run by itself it prints the directory, and with "clean" removes it.
#
# The directory is CULVERT_CACHE, or else culvert in XDG_CACHE_HOME, in ~/.cache or, without
# a home, beside Go's cache; where none of these can be written, the checkout's .cache.

# cache_root prints the directory and makes it.
cache_root() {
	local directory go=
	if [[ -z ${CULVERT_CACHE:-}${XDG_CACHE_HOME:-}${HOME:-} ]]; then
		go=$(go env GOCACHE 2>/dev/null || true)
	fi
	for directory in "${CULVERT_CACHE:-}" "${XDG_CACHE_HOME:+$XDG_CACHE_HOME/culvert}" "${HOME:+$HOME/.cache/culvert}" "${go:+${go%/*}/culvert}"; do
		if [[ $directory == /* ]] && mkdir -p "$directory" 2>/dev/null && [[ -w $directory ]]; then
			echo "$directory"
			return
		fi
	done
	directory=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache
	mkdir -p "$directory"
	echo "$directory"
}

# cached KIND KEY BUILD prints the directory KIND/KEY of the cache. When it is not there, the
# function BUILD makes its contents in the new directory that is its argument; what it prints goes
# to standard error. The directory appears complete or not at all; of one kind there is one build
# at a time, and a second caller waits and finds it done. A build removes those of its kind that
# nothing has used for 30 days.
cached() {
	local kind directory
	kind=$(cache_root)/$1
	directory=$kind/$2
	if ! cache_hit "$directory"; then
		mkdir -p "$kind"
		(
			set -euo pipefail # which a command substitution takes away
			# Not everywhere: without it, two may build the same.
			if command -v flock >/dev/null; then
				flock 9
			fi
			if ! cache_hit "$directory"; then
				cache_build "$directory" "$3" >&2
			fi
		) 9>"$kind/lock"
		[[ -e $directory/complete ]] || return 1
	fi
	echo "$directory"
}

# cache_hit says whether a directory is complete, and notes that it was used.
cache_hit() {
	touch -c "$1/complete" 2>/dev/null || true
	[[ -e $1/complete ]]
}

# cache_build DIRECTORY BUILD, under the lock.
cache_build() {
	local kind=${1%/*} new old
	find "$kind" -mindepth 1 -maxdepth 1 -name '.build-*' -mtime +0 -exec rm -rf {} + # of the killed
	find "$kind" -mindepth 2 -maxdepth 2 -name complete -mtime +30 | while read -r old; do
		rm -rf "${old%/complete}"
	done
	new=$(mktemp -d "$kind/.build-XXXXXX")
	# shellcheck disable=SC2064 # this directory
	trap "rm -rf ${new@Q}" EXIT
	chmod 755 "$new"
	GOGC=${GOGC:-400} "$2" "$new" # for the compiler: a fifth less processor time, for more memory
	touch "$new/complete"
	rm -rf "$1"
	mv "$new" "$1"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
	set -euo pipefail
	root=$(cache_root)
	if [[ ${1:-} == clean ]]; then
		rm -rf "${root:?}"/{bench,cilium,debian,helm,kernel,kubernetes,passed,tools}
	else
		echo "$root"
	fi
fi
