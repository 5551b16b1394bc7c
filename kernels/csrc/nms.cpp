#include "common.h"

void bind_nms(py::module_& m) { (void)m; }
