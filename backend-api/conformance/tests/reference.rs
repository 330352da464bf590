//! The naive device passes the suite whose reference it is: the suite can be passed.

use backend_conformance::ReferenceDevice;

#[test]
fn the_reference_device_passes() {
    let report = backend_conformance::run(&ReferenceDevice::new());
    assert_eq!(report.passed, backend_conformance::names().len());
}

#[test]
#[should_panic(expected = "no case's name has")]
fn a_filter_without_cases_is_an_error() {
    backend_conformance::run_filtered(&ReferenceDevice::new(), "no such case");
}
