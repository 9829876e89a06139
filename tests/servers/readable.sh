#!/usr/bin/env bash
# readable.sh DIRECTORY... -- COMMAND...
# Runs the command in a mount namespace of its own, where every user may pass what is above these directories. Python
# may well be where only root may look. Wants root.
set -euo pipefail
if [[ -z ${IN_NAMESPACE-} ]]; then
  IN_NAMESPACE=1 exec unshare --mount --propagation private bash "$0" "$@"
fi
unset IN_NAMESPACE

kept=()
while [[ $1 != -- ]]; do
  kept+=("$(realpath "$1")")
  shift
done
shift

mount -t tmpfs -o mode=755 tmpfs /mnt # seen here only
for index in "${!kept[@]}"; do
  mkdir "/mnt/$index"
  mount --bind "${kept[index]}" "/mnt/$index"
done

# Prints what is above the directory and only its owner may pass.
barrier() {
  local above='' part parts
  IFS=/ read -ra parts <<<"${1#/}"
  for part in "${parts[@]}"; do
    above+=/$part
    if (($(stat -c %a "$above") % 2 == 0)); then
      echo "$above"
      return
    fi
  done
}

for directory in "${kept[@]}"; do
  while found=$(barrier "$directory") && [[ $found ]]; do
    mount -t tmpfs -o mode=755 tmpfs "$found"
    for index in "${!kept[@]}"; do # what that has hidden
      if [[ ! -e ${kept[index]} ]]; then
        mkdir -p "${kept[index]}"
        mount --bind "/mnt/$index" "${kept[index]}"
      fi
    done
  done
done
exec "$@"
