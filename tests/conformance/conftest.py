"""The conformance tests fetch files, so they are collected only when asked for by `-m conformance`."""

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "torch_export_test",
    "order",
)


def pytest_ignore_collect(collection_path, config):
    return True if config.getoption("markexpr") != "conformance" and collection_path.name != "conformance" else None


def pytest_configure(config):
    # Markers of the fetched tests; this repository's own are strict.
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: transformers' own")
