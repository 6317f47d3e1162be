"""Run as a program: do the locked packages have known vulnerabilities that a newer version fixes? Exit code 1 if so.

Without pip-audit, or without a way to its advisory service, it says so and passes: a laptop on a train can still lint.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parents[2] / "requirements.lock"
_NO_WAY_THERE = re.compile(
    r"ConnectionError|ProxyError|SSLError|Timeout|timed out|Max retries|Name or service|resolve|unreachable|HTTPError",
    re.I,
)


def judge(code: int, output: str, errors: str) -> tuple[int, str]:
    """(exit code, what to say) from how pip-audit ended."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or ["no output"])[-1][:300]
        if _NO_WAY_THERE.search(errors):
            return 0, f"audit: SKIPPED, the advisory service cannot be reached ({last.partition(':')[0]})"
        return code or 1, f"audit: pip-audit failed: {last}"
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return 0, "audit: SKIPPED, the advisory service knows none of the packages"
    found = [(package, flaw) for package in asked for flaw in package.get("vulns", [])]
    lines = [
        f"audit: {package['name']} {package['version']}: {flaw['id']}, "
        + (f"fixed in {', '.join(flaw['fix_versions'])}" if flaw["fix_versions"] else "no fix yet")
        for package, flaw in found
    ]
    fixable = sum(bool(flaw["fix_versions"]) for _, flaw in found)
    lines.append(f"audit: {len(asked)} of {len(packages)} packages asked for, {fixable} fixable known vulnerabilities")
    return int(fixable > 0), "\n".join(lines)


def main() -> int:
    """Ask about requirements.lock."""
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: SKIPPED, pip-audit is not installed (pip install pip-audit)")
        return 0
    command = [sys.executable, "-m", "pip_audit", "-r", str(LOCK), "--no-deps", "--disable-pip", "-f", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--timeout", "10"], capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        print("audit: SKIPPED, the advisory service does not answer")
        return 0
    code, text = judge(done.returncode, done.stdout, done.stderr)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
