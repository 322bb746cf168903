#!/bin/bash
# Copy folders of shards to this node's own disk: copy_shards.sh TO SHARDS...
# The name of a copy is the hash of its manifest. Every later job that reads the same data can therefore use the copy,
# until the site cleans the disk. A copy gets its final name when it is complete.
set -euo pipefail
to=$1
shift
mkdir -p "$to"
exec 9>"$to/.lock"
flock 9
for shards; do
    name=$(sha256sum <"$shards/manifest.json")
    copy=$to/${name:0:16}
    [ ! -e "$copy" ] || continue
    [ ! -e "$copy.part" ] || chmod -R u+rwX "$copy.part"  # an earlier copy may have left read-only folders
    rm -rf "$copy.part"
    need=$(du --summarize --dereference --block-size=1M "$shards" | cut -f1)
    free=$(df --output=avail --block-size=1M "$to" | tail -n 1)
    [ "$need" -lt "$free" ] || { echo "node $(hostname): $shards needs $need MiB, $to has $free" >&2; exit 1; }
    cp -rL --no-preserve=mode "$shards" "$copy.part"
    mv "$copy.part" "$copy"
done
