"""report.html: numbers, curves and pictures on one page that trusts no title."""
import json
import re

from PIL import Image

from helpers import run, write_shop


def test_the_report_page_holds_its_pictures_and_trusts_no_title(tmp_path):
    shop = write_shop(tmp_path / "shop", items=6)
    Image.new("RGB", (50, 40), "red").save(shop / "a.png")
    (shop / "bad.jpg").write_text("no picture")
    with open(shop / "items.jsonl", "w") as file:
        for i in range(6):
            title = "<b onload=x>&" if i else "<script>alert(1)</script> a < b & c"
            row = {"item": f"i{i}", "title": title, "images": [("a.png", "bad.jpg")[i % 2]]}
            file.write(json.dumps(row) + "\n")
    flags = ("--text", "hash", "--image", "pixels", "--dim", 16, "--epochs", 4)
    run("train.py", "--model", "sasrec", "--data", "shop", *flags, cwd=tmp_path)
    folder = tmp_path / "runs" / "sasrec-shop-0"
    page = (folder / "report.html").read_text()
    numbers = json.loads((folder / "metrics.json").read_text())
    assert f"{numbers['test']['ndcg@10']:.4f}" in page
    assert f"{numbers['test_masked']['recall@50']:.4f}" in page
    assert page.count("<section>") == 8
    assert page.count("<polyline") == 2    # the loss, and the validation metric
    assert "data:image/jpeg;base64," in page
    assert "<script" not in page and "onload" not in page
    assert "a &lt; b &amp; c" in page
    assert not re.search(r"""(src|href)=["'](?!data:image/jpeg)|url\(|@import""", page)
