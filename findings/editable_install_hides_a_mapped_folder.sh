#!/usr/bin/env bash
# A folder that setup.cfg maps to a sub-package, and that has no __init__.py, imports from a wheel but not from an editable
# install.
#
# Versions:  setuptools 84.2.1, pip 23.2.1, Python 3.11
# Guess:     `pip install -e .` makes importable what `pip install .` does. `packages` lists `shop` and `shop.scripts`, and
#            `package_dir` maps the second to the folder `tools`, which then is a namespace package under either install.
# Seen:      from the wheel, `import shop.scripts.hello` works: the folder was copied into the package. After the editable
#            install it raises ModuleNotFoundError, although the finder that was installed lists the folder
#            among its namespaces. With an empty __init__.py in the folder, both installs work. Nothing warns.
# Matters:   scripts that a project keeps beside its package and installs as a part of it are missing for its developers only.
# Output seen:
#            without __init__.py: wheel imports, editable install: ModuleNotFoundError: No module named 'shop.scripts'
#            with __init__.py: wheel imports, editable install imports
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/project/shop" "$folder/project/tools"
cd "$folder/project"
touch shop/__init__.py
echo 'print("hello")' > tools/hello.py
cat > pyproject.toml <<'TOML'
[build-system]
requires = ["setuptools==84.2.1"]
build-backend = "setuptools.build_meta"
TOML
cat > setup.cfg <<'CFG'
[metadata]
name = shop
version = 1.0
[options]
packages =
    shop
    shop.scripts
package_dir =
    shop.scripts = tools
CFG
try() {  # how to install -> "imports", or the error
    rm -rf "$folder/venv" build ./*.egg-info
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"
    (cd "$folder" && { venv/bin/python -c "import shop.scripts.hello" > said 2>&1 && echo imports || tail -1 said; })
}
wheel=$(try .)
editable=$(try -e .)
echo "without __init__.py: wheel $wheel, editable install: $editable"
touch tools/__init__.py
wheel_with=$(try .)
editable_with=$(try -e .)
echo "with __init__.py: wheel $wheel_with, editable install $editable_with"
[[ $wheel == imports && $editable == "ModuleNotFoundError: No module named 'shop.scripts'" ]] || { echo "the behaviour has changed"; exit 1; }
[[ $wheel_with == imports && $editable_with == imports ]] || { echo "the behaviour has changed"; exit 1; }
