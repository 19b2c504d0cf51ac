"""File names that artists type into Save and Calibrate."""

import pytest

from stepquant.errors import FormatError
from stepquant.nodes.file_names import checked_name, file_state


@pytest.mark.parametrize("name", ["my model", "my model.safetensors", "  my model "])
def test_checked_name_adds_the_extension_once(name, tmp_path):
    assert checked_name(name, str(tmp_path)) == str(tmp_path / "my model.safetensors")


@pytest.mark.parametrize("name", ["sub/model", "sub\\model", "sub//model"])
def test_checked_name_makes_the_subfolder(name, tmp_path):
    assert checked_name(name, str(tmp_path)) == str(tmp_path / "sub" / "model.safetensors")
    assert (tmp_path / "sub").is_dir()


@pytest.mark.parametrize("name", ["", "   ", "../out", "a/../../out", "/etc/out", "C:\\out", "what?", "a\nb", ".safetensors"])
def test_checked_name_refuses_names_that_leave_the_folder_or_no_system_takes(name, tmp_path):
    with pytest.raises(FormatError, match=r"not a usable name.*Give a plain one"):
        checked_name(name, str(tmp_path / "models"))
    assert not list(tmp_path.iterdir())


def test_checked_name_says_so_when_a_file_is_where_the_folder_should_be(tmp_path):
    (tmp_path / "sub").write_text("")
    with pytest.raises(FormatError, match=r"cannot make this folder.*Choose another"):
        checked_name("sub/model", str(tmp_path))


def test_file_state_changes_when_the_file_is_replaced(tmp_path):
    path = tmp_path / "model.safetensors"
    states = [file_state(str(path))]
    for content in ("a", "ab"):
        path.write_text(content)
        states.append(file_state(str(path)))
    assert len(set(states)) == 3
