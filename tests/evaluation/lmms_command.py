"""lmms-eval's own command line, run by the Python of `.venv-lmms`; see test_lmms.py."""

from aurora.runtime import define_missing_torchvision_ops

define_missing_torchvision_ops()  # the wheel of torchvision does not import beside torch for CPUs

from lmms_eval.cli.dispatch import main  # noqa: E402

if __name__ == "__main__":
    main()
