#!/bin/sh
# Brings Debian's headless Chromium into a folder, with the libraries it lacks here and a font. Argument: the folder.
#
# Nothing of the system changes and nobody needs to be root: apt only downloads, its lists and packages lie in the
# folder while they are needed, and the packages are unpacked, never installed. FOLDER/bin/chromium starts the browser.
set -eu

folder=$(cd "$1" && pwd)
home=$folder/chromium
part=$folder/chromium.part

for name in chromium chromium-browser chromium-headless-shell google-chrome; do
  # A command that only asks for a snap does not tell its version.
  if "$name" --version >/dev/null 2>&1; then exit 0; fi
done
if "$folder/bin/chromium" --version >/dev/null 2>&1; then exit 0; fi

refuse() {
  echo "chromium could not be installed ($1): the tests that use it will be skipped"
  exit 0
}

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || refuse "there is no apt"
rm -rf "$home" "$part" "$folder/bin/chromium"
trap 'rm -rf "$part"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$part/lists/partial" "$part/debs" "$part/root"
log=$part/log

# Without hooks, which may tidy the system's own folders, and without a cache there.
cat >"$part/apt.conf" <<'END'
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
END
apt() { apt-get -qq -c "$part/apt.conf" "$@"; }

# The headless build is the same browser without GTK and what GTK needs; older Debians have only the other one. The
# machine's own lists may be old, or not there at all, so they are what is left where no newer ones can be had.
fresh=Dir::State::lists=$part/lists
apt -o "$fresh" update >"$log" 2>&1 || :
machine=Dir::State::lists=$(apt-config shell d Dir::State::lists/d | sed "s/^d='\(.*\)'$/\1/")
wanted=
for package in chromium-headless-shell chromium; do
  for lists in "$fresh" "$machine"; do
    if wanted=$(apt -o "$lists" -s install --no-install-recommends "$package" 2>>"$log"); then break 2; fi
  done
done
# Two versions of the C library cannot be mixed in one process, so it stays the machine's.
names=$(printf '%s\n' "$wanted" | sed -n 's/^Inst \([^ ]*\).*/\1/p' | grep -Ev '^(libc6|libc-bin|libgcc-s1|gcc-[0-9]+-base)(:|$)') \
  || refuse "$(tail -n 1 "$log")"
(cd "$part/debs" && apt -o "$lists" download $names fonts-dejavu-core) >>"$log" 2>&1 \
  || refuse "$(tail -n 1 "$log")"
for deb in "$part"/debs/*.deb; do
  dpkg-deb -x "$deb" "$part/root" >>"$log" 2>&1 || refuse "$(tail -n 1 "$log")"
  rm "$deb"
done
# No test looks at these, and they are a tenth of it.
rm -rf "$part/root/usr/share/doc" "$part/root/usr/share/man" "$part/root/usr/share/locale"
rm -f "$part/root/usr/lib/chromium/libVkLayer_khronos_validation.so"

# Pages are drawn with this font first, so that a screenshot looks alike everywhere.
cat >"$part/root/fonts.conf" <<'END'
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir prefix="relative">usr/share/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
  <alias binding="same"><family>sans-serif</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias binding="same"><family>system-ui</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias binding="same"><family>serif</family><prefer><family>DejaVu Serif</family></prefer></alias>
  <alias binding="same"><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
END

# The launcher finds everything from its own place. The browser's folder is not in the path: it looks there by itself.
libraries=$(cd "$part/root" && find lib usr/lib -name '*.so*' ! -path 'usr/lib/chromium/*' -printf ':$here/%h\n' 2>/dev/null |
  sort -u | tr -d '\n') || :
cat >"$part/root/launch" <<END
#!/bin/sh
here=\$(CDPATH= cd "\$(dirname "\$(readlink -f "\$0")")" && pwd) || exit
export LD_LIBRARY_PATH="\$here/usr/lib$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export FONTCONFIG_FILE="\$here/fonts.conf" XDG_CACHE_HOME="\$here/cache"
for program in chromium-headless-shell chromium; do
  [ ! -x "\$here/usr/lib/chromium/\$program" ] || exec "\$here/usr/lib/chromium/\$program" "\$@"
done
exit 127
END
chmod +x "$part/root/launch"

# Whether it starts is known only when it has started: libraries, the sandbox, a page.
sandbox=
[ "$(id -u)" != 0 ] || sandbox=--no-sandbox
timeout 60 "$part/root/launch" --headless $sandbox --disable-gpu --user-data-dir="$part/profile" --dump-dom \
  'data:text/html,<p>it starts</p>' >"$part/dom" 2>>"$log" || refuse "it does not start: $(tail -n 1 "$log")"
grep -q 'it starts' "$part/dom" || refuse "it shows no page: $(tail -n 1 "$log")"

mv "$part/root" "$home"
ln -s ../chromium/launch "$folder/bin/chromium"
