"""The names of the package are the same things whatever has been imported before."""

import pkgutil
import subprocess
import sys

import stagewise as sw


def test_no_public_name_is_also_a_module_that_would_take_its_place():
    assert {module.name for module in pkgutil.iter_modules(sw.__path__)}.isdisjoint(sw.__all__)


def test_report_is_still_the_function_after_a_report_was_drawn():
    import stagewise.reporting
    import stagewise.run.pipeline

    assert sw.report is stagewise.run.pipeline.report


def test_storing_results_does_not_load_the_drawing_room():
    code = "import sys, stagewise.run.folder, stagewise.run.analysis; print('stagewise.reporting' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
